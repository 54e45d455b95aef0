"""The player as HTML: what it was given, its readable code, and a table for those who have no JavaScript."""

from __future__ import annotations

import base64
import html
import json
from functools import lru_cache
from importlib import resources
from typing import Any

from tdhook_rl.report.player.budget import Contents

_BODY = "body{margin:0;padding:16px;background:#fff}@media(prefers-color-scheme:dark){body{background:#14181d}}"


@lru_cache(maxsize=1)
def code() -> str:
    """The style and the program, which a page needs once."""
    folder = resources.files("tdhook_rl.report.player")
    style, program = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("player.css", "player.js"))
    return f"<style>\n{style}</style>\n<script>\n{program}</script>"


def fragment(name: str, contents: Contents, with_code: bool = True) -> str:
    """The player for a page; several may be in one.

    Args:
        name: what links call it.
        contents: what it shows.
        with_code: whether the code comes with it.
    """
    data = [base64.b64encode(one.data).decode() for one in contents.arrays]
    told = json.dumps({**contents.head, "data": data}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Nothing in it ends the element that it is in.
    for sign in "<>&\u2028\u2029":
        told = told.replace(sign, f"\\u{ord(sign):04x}")
    title = html.escape(contents.head["title"] or "Episodes")
    return (
        f'<section class="tdp" data-player="{html.escape(name)}" aria-label="{title}">\n'
        f'<div class="tdp-still">{_still(contents.head)}</div>\n'
        f'<script type="application/json">{told}</script>\n</section>\n' + (code() if with_code else "")
    )


def page(name: str, contents: Contents) -> str:
    """A page with one player, which needs no network."""
    title = html.escape(contents.head["title"] or "Episodes")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title><style>{_BODY}</style></head><body>\n'
        f"<main>{fragment(name, contents)}</main>\n</body></html>\n"
    )


def _still(head: dict[str, Any]) -> str:
    """What there is, as a table: shown until the player runs."""
    rows = []
    for episode in head["episodes"]:
        for name, part in zip(head["sets"], episode["parts"], strict=True):
            if part is not None:
                total = "" if part["total"] is None else f"{part['total']:.3g}"
                cells = (" · ".join(one for one in (episode["name"], name) if one), part["length"], total, part["end"])
                rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    columns = "".join(f"<th>{name}</th>" for name in ("episode", "steps", "return", "end"))
    title = html.escape(head["title"] or "Episodes")
    return f"<h2>{title}</h2><table><tr>{columns}</tr>\n{''.join(rows)}</table><p>The player needs JavaScript.</p>"
