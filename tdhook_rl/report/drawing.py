"""A figure that can be saved, put into a page, and read without being seen."""

from __future__ import annotations

import html
import io
import json
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.files.durable import put

#: The colours that follow the page: of text and axes, and of grids. In a file of its own they are these.
INK, LINES = "#1d232b", "#d5dae1"
#: What figures lie on, in the light and in the dark: every colour can be told from both.
PAPER, NIGHT = "#ffffff", "#14181d"

_STYLE = {
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


#: What an SVG of matplotlib consists of.
_ELEMENTS = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "image", "circle"}


_TAG = re.compile(r"<[^>]*>")


@contextmanager
def house_style() -> Iterator[None]:
    """How our figures look, whatever a user has set; what they set is as before afterwards."""
    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's fonts may have what ours lack
        yield


@dataclass(eq=False, kw_only=True)
class Drawing:
    """A matplotlib figure with what it shows.

    Args:
        figure: of matplotlib.
        title: a few words, for a heading.
        alt: what a reader who cannot see it has to know: the answer, with its numbers.
        data: the numbers that were drawn; arrays, tensors and intervals become what JSON takes, NaN becomes ``None``.
        caption: a sentence that says what to see, and what the numbers rest on.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = Figure()
        >>> _ = figure.subplots().plot([0, 1], [0, 2])
        >>> drawing = Drawing(figure=figure, title="Return", alt="Return rises from 0 to 2.", data={"return": [0, 2]})
        >>> drawing.svg().startswith("<svg"), "Return rises" in drawing.svg()
        (True, True)
    """

    figure: Any
    title: str
    alt: str
    data: Mapping[str, Any] = field(default_factory=dict)
    caption: str = ""

    def __post_init__(self) -> None:
        self.data = plain(self.data)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write it as PNG or SVG, as the name ends, with its data beside it (``.json``).

        Raises:
            InputError: for a name with another ending.
            ArtifactError: if it cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise InputError(f"a figure is saved as .png or .svg, got {path.name!r}")
        if path.suffix == ".svg":
            put(path, self.svg())
        else:
            content = io.BytesIO()
            with house_style():
                self.figure.savefig(content, format="png", dpi=160, bbox_inches="tight", facecolor=PAPER)
            put(path, content.getvalue())
        facts = {"title": self.title, "alt": self.alt, "caption": self.caption, "data": self.data}
        put(path.with_suffix(".json"), json.dumps(facts, indent=1, allow_nan=False) + "\n")
        return path

    def svg(self) -> str:
        """The figure as SVG: text is text, and its ink follows the page in the light and in the dark.

        In a page that is narrower than the figure it shrinks, but not to where its text cannot be read: let what it is
        in scroll (``overflow-x: auto``). Several fit into one page: no two figures share an id.
        """
        with house_style():
            import matplotlib

            file = io.StringIO()
            matplotlib.rcParams["svg.hashsalt"] = self.title
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata=nothing)
        text = file.getvalue()
        text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
        # Only what is referred to needs an id, and none may be that of another figure.
        mark = f"f{zlib.crc32((self.title + self.alt + text).encode()):08x}-"
        used = set(re.findall(r'(?:"|\()#([^")]+)', "".join(_TAG.findall(text))))
        text = in_tags(r' id="([^"]*)"', lambda one: f' id="{mark}{one[1]}"' if one[1] in used else "", text)
        text = in_tags(r'("|\()#(?=[^")]+["\)])', lambda one: f"{one[1]}#{mark}", text)
        text = in_tags(f"(?i:{INK})", lambda _: "currentColor", text)
        text = in_tags(f"(?i:{LINES})", lambda _: f"var(--lines, {LINES})", text)
        # The page decides how wide it is, within where its text can be read and is no larger than a heading.
        size = re.compile(r' width="([\d.]+)pt" height="[\d.]+pt"')
        width = float(size.findall(text)[0])
        shape = f"width:100%;min-width:{0.8 * width:.0f}pt;max-width:{1.25 * width:.0f}pt;stroke-linejoin:round"
        opening = f'<svg role="img" aria-label="{html.escape(self.alt)}" style="{shape}"'
        return size.sub("", text, count=1).replace("<svg", opening, 1)

    def _repr_html_(self) -> str:
        caption = html.escape(self.caption)
        return (
            f'<figure style="margin:0;overflow-x:auto"><strong>{html.escape(self.title)}</strong><br>{self.svg()}'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def in_tags(pattern: str, change: Callable[[re.Match[str]], str], svg: str) -> str:
    """The same SVG with what its tags say changed: what is written in it stays, whatever a name looks like.

    Example:
        >>> in_tags('#a', lambda _: '#b', '<use href="#a"/><text>agent (#a)</text>')
        '<use href="#b"/><text>agent (#a)</text>'
    """
    return _TAG.sub(lambda tag: re.sub(pattern, change, tag[0]), svg)


def as_drawn(content: bytes) -> str | None:
    """A saved drawing as a page takes it, where that is what it is: other SVG may hold code.

    Example:
        >>> as_drawn(b"<svg><script>alert(1)</script></svg>") is None
        True
    """
    text = content.decode(errors="replace")
    known = text.startswith('<svg role="img"') and text.rstrip().endswith("</svg>")
    names = set(re.findall(r"<([a-zA-Z][^\s/>]*)", text))
    code = re.search(r"\son\w+\s*=|javascript:", text, re.IGNORECASE)
    return text if known and names <= _ELEMENTS and not code else None


def plain(value: Any) -> Any:
    """What JSON takes: lists for arrays, mappings for intervals, ``None`` for what is not finite.

    Example:
        >>> plain({"a": np.array([1.0, np.nan]), 2: (True, None, float("inf"))})
        {'a': [1.0, None], '2': [True, None, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple | range | set):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
