"""Figures and galleries, each with its data and the command that makes it again."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from tdhook_rl.errors import ArtifactError
from tdhook_rl.report.drawing import Drawing, as_drawn, in_tags
from tdhook_rl.report.page.parts import Figure, Fragment, Gallery
from tdhook_rl.report.page.place import Place
from tdhook_rl.report.page.saved import as_json, data_link, embedded


def drawing(part: Drawing, place: Place) -> str:
    """A figure as SVG, whose texts are text and whose ink is the page's."""
    one = place.id(f"figure {part.title}")
    try:
        svg = _apart(part.svg(), one)
    except Exception as error:  # numbers that a figure cannot show are in its data nevertheless
        svg = f'<p class="soft">It cannot be drawn ({html.escape(f"{type(error).__name__}: {error}"[:200])}).</p>'
    label = html.escape(part.title or "Figure", quote=True)
    return (
        f'{place.heading(part.title)}<figure><div class="drawing" tabindex="0" role="group" aria-label="{label}">'
        f"{svg}</div>{_caption(part.caption)}</figure>\n{_beside(part.title, part.data, place)}"
    )


def panels(parts: list[Drawing], place: Place) -> str:
    """Small figures side by side where there is room."""
    return f'<div class="panels">{"".join(f"<div>{drawing(part, place)}</div>" for part in parts)}</div>\n'


def figure(part: Figure, place: Place) -> str:
    """A picture in a file.

    Raises:
        ArtifactError: if it cannot be read.
    """
    path = Path(part.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"the figure {path} cannot be read: {error.strerror}") from error
    ours = as_drawn(content) if path.suffix == ".svg" else None
    picture = _apart(ours, place.id(f"figure {part.heading}")) if ours else None
    picture = picture or embedded(content, path.suffix, part.alt or part.caption or part.heading)
    return (
        f'{place.heading(part.heading)}<figure><div class="drawing">{picture}</div>{_caption(part.caption)}</figure>\n'
        f"{_beside(part.heading, part.data, place)}"
    )


def gallery(part: Gallery, place: Place) -> str:
    """Pictures side by side."""
    heading = place.heading(part.heading)
    text = f'<p class="text">{html.escape(part.text)}</p>\n' if part.text else ""
    shown = "".join(
        f"<figure>{embedded(one.content, one.ending, one.alt)}{_caption(one.caption)}</figure>\n"
        for one in part.pictures
    )
    return f'{heading}{text}<div class="gallery">{shown}</div>\n'


def fragment(part: Fragment, place: Place) -> str:
    """HTML of others, as it is."""
    text = f'<p class="text">{html.escape(part.text)}</p>\n' if part.text else ""
    return f"{place.heading(part.heading)}{text}{part.html}\n"


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def _beside(title: str, data: Any, place: Place) -> str:
    said = [f"Data: {data_link(title or 'figure', as_json(data), 'json')}"] if data else []
    if place.command:
        again = f"<pre><code>{html.escape(place.command)}</code></pre>"
        said.append(f"<details><summary>make it again</summary>{again}</details>")
    return f'<div class="beside">{" · ".join(said)}</div>\n' if said else ""


def _apart(svg: str, one: str) -> str:
    """The same picture with ids that no other one in the page has: one drawing may stand in it twice."""
    svg = in_tags(r'\bid="([^"]*)"', lambda found: f'id="{one}-{found[1]}"', svg)
    return in_tags(r'(href="|url\()#', lambda found: f"{found[1]}#{one}-", svg)
