"""A figure that can be saved, put into a page, and read without being seen."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError
from tdhook_rl.files.durable import write_text

__all__ = ["INK", "LINES", "Drawing"]

#: The colours that follow the page: of text and axes, and of grids. In a file of its own they are these.
INK, LINES = "#1d232b", "#d5dae1"


@dataclass(eq=False, kw_only=True)
class Drawing:
    """A matplotlib figure with what it shows.

    Args:
        figure: of matplotlib.
        title: a few words, for a heading.
        alt: what a reader who cannot see it has to know: the answer, with its numbers.
        data: the numbers that were drawn, as JSON takes them.
        caption: a sentence that says what to see.

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

    def save(self, path: str | Path) -> Path:
        """Write it as PNG or SVG, as the name ends, with its data beside it (``.json``).

        Raises:
            InputError: for a name with another ending.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            write_text(path, self.svg())
        elif path.suffix == ".png":
            self.figure.savefig(path, dpi=130, bbox_inches="tight")
        else:
            raise InputError(f"a figure is saved as .png or .svg, got {path.name!r}")
        facts = {"title": self.title, "alt": self.alt, "caption": self.caption, "data": self.data}
        write_text(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
        return path

    def svg(self) -> str:
        """The figure as SVG for a page: text is text, and its ink follows the page in the light and in the dark."""
        import matplotlib

        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title}):
            self.figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(INK, "currentColor", text, flags=re.IGNORECASE)
        text = re.sub(LINES, "var(--lines, " + LINES + ")", text, flags=re.IGNORECASE)
        return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(self.alt)}"', 1)

    def _repr_html_(self) -> str:
        return f"<figure>{self.svg()}<figcaption>{html.escape(self.caption)}</figcaption></figure>"
