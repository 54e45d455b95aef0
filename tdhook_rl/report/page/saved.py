"""Files within the page: data that a reader can save, and pictures as they are in their files."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from tdhook_rl.errors import InputError
from tdhook_rl.report.page.numbers import amount
from tdhook_rl.statistics import Interval

#: Browsers refuse to save longer ones.
MOST_BYTES = 1_500_000
_KINDS = {"csv": "text/csv", "json": "application/json", "txt": "text/plain"}
PICTURES = {
    "png": "image/png", "gif": "image/gif", "jpg": "image/jpeg", "jpeg": "image/jpeg", "svg": "image/svg+xml",
    "webp": "image/webp", "mp4": "video/mp4", "webm": "video/webm",
}  # fmt: skip


def file_name(text: str) -> str:
    """A name that every file system takes, also as an id in the page.

    Example:
        >>> file_name("Probe of <the door>, trained/untrained")
        'probe-of-the-door-trained-untrained'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "part"


def data_link(name: str, content: str, kind: str) -> str:
    """A link that saves a text as a file: it needs neither network nor script."""
    size = len(content.encode(errors="replace"))
    if size > MOST_BYTES:
        return f'<span class="soft">{kind.upper()} left out: {amount(size)} is more than a page carries</span>'
    url = f"data:{_KINDS[kind]};charset=utf-8,{quote(content, safe=',.:-_+()*~!/;=@', errors='replace')}"
    file = f"{file_name(name)}.{kind}"
    label = html.escape(f"{name} as {kind.upper()}", quote=True)
    return (
        f'<a class="data" download="{file}" href="{url}" aria-label="{label}">'
        f"{kind.upper()} <span>({amount(size)})</span></a>"
    )


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; intervals become three columns, what is not finite stays empty.

    Example:
        >>> as_csv(["name", "value"], [["a", 0.5], ["b", float("nan")]])
        'name,value\\na,0.5\\nb,\\n'
    """
    wide = [any(isinstance(row[place], Interval) for row in rows) for place in range(len(columns))]
    head = [
        name
        for column, is_wide in zip(columns, wide, strict=True)
        for name in ([column, f"{column} (low)", f"{column} (high)"] if is_wide else [column])
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        cells: list[Any] = []
        for value, is_wide in zip(row, wide, strict=True):
            if isinstance(value, Interval):
                cells += [value.estimate, value.low, value.high]
            else:
                cells += [value, None, None] if is_wide else [value]
        writer.writerow([None if isinstance(one, float) and not math.isfinite(one) else one for one in cells])
    return text.getvalue()


def as_json(data: Any) -> str:
    """JSON with finite numbers only, whatever is given: what is not finite is ``null``.

    Example:
        >>> as_json({"a": [1, float("inf")]})
        '{"a": [1, null]}'
    """
    return json.dumps(_plain(data), default=str)


def _plain(data: Any, depth: int = 20) -> Any:
    if hasattr(data, "tolist"):
        data = data.tolist()
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping) and depth:
        return {str(name): _plain(value, depth - 1) for name, value in data.items()}
    if isinstance(data, list | tuple) and depth:
        return [_plain(value, depth - 1) for value in data]
    return data if data is None or isinstance(data, str | int | bool) else str(data)


def embedded(content: bytes, ending: str, alt: str) -> str:
    """A picture, or a video, with its words.

    Raises:
        InputError: for a kind of file that browsers do not show.
    """
    kind = PICTURES.get(ending.lower().lstrip("."))
    if kind is None:
        raise InputError(f"a page shows {', '.join(PICTURES)}, got a file that ends with {ending!r}")
    url, words = f"data:{kind};base64,{base64.b64encode(content).decode()}", html.escape(alt, quote=True)
    if kind.startswith("video/"):
        return f'<video controls muted loop playsinline aria-label="{words}" src="{url}"></video>'
    return f'<img alt="{words}" src="{url}">'
