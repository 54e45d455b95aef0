"""A page in one file: its parts as HTML, with styles and script inside, so that it opens anywhere and can be mailed."""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.files.durable import put
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.media import DataTable, Image
from tdhook_rl.report.page import answers, pictures, tables
from tdhook_rl.report.page.findings_file import save_findings
from tdhook_rl.report.page.parts import (
    Cautions,
    Facts,
    Figure,
    Finding,
    Findings,
    Fragment,
    Gallery,
    Picture,
    Section,
    Table,
)
from tdhook_rl.report.page.place import Place
from tdhook_rl.report.page.saved import file_name
from tdhook_rl.report.sinks.names import told_apart

#: From so many sections on a page has a table of contents.
CONTENTS = 4


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report: a title, and parts in order.

    Args:
        title: of the page.
        lead: a sentence or two below it: what was done, and what came out.
        parts: of :mod:`tdhook_rl.report.page`: ``Findings`` first; ``Cautions``, ``Table``, ``Figure``, ``Gallery``,
            ``Facts``, ``Fragment``, ``Section``; a :class:`~tdhook_rl.report.drawing.Drawing`, a list of them side by
            side, a ``DataTable`` or an ``Image`` as they are logged; a text is a paragraph.
        command: what makes the page again, shown beside its figures.

    Raises:
        InputError: for what is no part of a page.

    Example:
        >>> page = Page(title="Runs", lead="Two runs.", parts=[Table("Returns", ["run", "return"], [["a", 0.5]])])
        >>> "<h1>Runs</h1>" in page.html(), "<h2" in page.html()
        (True, True)
    """

    title: str
    lead: str = ""
    parts: Sequence[Any] = ()
    command: str = ""

    def html(self) -> str:
        """The page, which needs nothing else."""
        place = Place(self.command)
        body = "\n".join(written(part, place) for part in self.parts)
        title, lead = html.escape(self.title), html.escape(self.lead)
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{_source('style.css')}</style></head>\n<body>\n"
            '<a class="skip" href="#content">Skip to the content</a>\n'
            f"<header><h1>{title}</h1>\n{f'<p class=lead>{lead}</p>' if lead else ''}\n"
            '<button id="theme" type="button" hidden>Dark</button></header>\n'
            f'{_contents(place)}<main id="content" tabindex="-1">\n{body}\n</main>\n<footer>{self._end()}</footer>\n'
            f"<script>\n{_source('page.js')}</script>\n</body></html>\n"
        )
        return text.encode(errors="replace").decode()  # half a pair of surrogates is no letter

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the page; whoever reads meanwhile has the old one or the new one.

        Raises:
            ArtifactError: if it cannot be written.
        """
        return put(Path(path), self.html())

    def keep(self, folder: str | Path) -> Path:
        """Write ``report.html`` into the folder of a run; its findings and drawings lie beside it then as files.

        ``tdhook-rl report`` makes the page of such a folder again, or one page of several.

        Raises:
            ArtifactError: if something cannot be written.
        """
        folder = Path(folder)
        found: list[Finding] = []
        drawings: dict[str, Drawing] = {}
        for part in _flat(self.parts):
            if isinstance(part, Findings):
                found += part.found
            elif isinstance(part, Drawing):
                name = one = told_apart(file_name(part.title), part.title)
                while one in drawings:  # of titles that are cut, or the same
                    one = f"{name}-{len(drawings) + 1}"
                drawings[one] = part
        if found:
            save_findings(folder, found)
        for name, drawing in drawings.items():
            drawing.save(folder / "figures" / f"{name}.png")
        return self.save(folder / "report.html")

    def _repr_html_(self) -> str:
        # In a frame of its own: a notebook has styles, and ids, of its own too.
        source, title = (html.escape(one, quote=True) for one in (self.html(), self.title))
        return f'<iframe srcdoc="{source}" title="{title}" width="100%" height="800"></iframe>'

    def _end(self) -> str:
        from tdhook_rl import __version__

        again = f" by <code>{html.escape(self.command)}</code>" if self.command else ""
        return f"Written on {time.strftime('%Y-%m-%d %H:%M')}{again}, tdhook_rl {html.escape(__version__)}."


def write_report(path: str | Path, title: str, lead: str, parts: Sequence[Any], *, command: str = "") -> Path:
    """Write a page: as ``Page(title=title, lead=lead, parts=parts, command=command).save(path)``."""
    return Page(title=title, lead=lead, parts=parts, command=command).save(path)


def _flat(parts: Sequence[Any]) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, Section | list):
            yield from _flat(part.parts if isinstance(part, Section) else part)
        else:
            yield part


@functools.singledispatch
def written(part: Any, place: Place) -> str:
    """A part as HTML.

    Raises:
        InputError: for what is none.
    """
    known = ", ".join(sorted(kind.__name__ for kind in written.registry if kind is not object))
    raise InputError(f"a page consists of {known}; got {part!r:.80} ({type(part).__name__})")


written.register(Table, tables.table)
written.register(Findings, answers.findings)
written.register(Cautions, answers.cautions)
written.register(Facts, tables.facts)
written.register(Drawing, pictures.drawing)
written.register(Figure, pictures.figure)
written.register(Gallery, pictures.gallery)
written.register(Fragment, pictures.fragment)


@written.register
def _(part: str, place: Place) -> str:
    return f"<p>{html.escape(part)}</p>\n"


@written.register
def _(part: list, place: Place) -> str:
    return pictures.panels(part, place)


@written.register
def _(part: DataTable, place: Place) -> str:
    return tables.table(Table("", list(part.columns), part.rows), place)


@written.register
def _(part: Image, place: Place) -> str:
    caption = part.caption or "picture"
    return pictures.gallery(Gallery("", [Picture(part.content(), "png", part.caption, caption)]), place)


@written.register
def _(part: Section, place: Place) -> str:
    heading = place.heading(part.heading)
    text = f'<p class="text">{html.escape(part.text)}</p>\n' if part.text else ""
    inner = place.inner()
    return f"{heading}{text}" + "\n".join(written(one, inner) for one in part.parts)


def _contents(place: Place) -> str:
    if len(place.contents) < CONTENTS:
        return ""
    links = "".join(f'<li><a href="#{one}">{html.escape(text)}</a></li>' for one, text in place.contents)
    return f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n'


@functools.cache
def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
