"""What a page consists of beside drawings: findings, cautions, tables, pictures, facts, and HTML of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError


@dataclass(frozen=True)
class Table:
    """Rows of cells under a heading; it sorts by each column, and is a CSV file within the page.

    Args:
        heading: a few words; empty for none.
        columns: names.
        rows: texts, numbers, truth values, :class:`~tdhook_rl.statistics.Interval`, or ``None`` for nothing. Cells that
            read ``yes`` or ``no`` are coloured.
        text: what to know about it.

    Raises:
        InputError: for a row of another length than the columns.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""

    def __post_init__(self) -> None:
        odd = next((row for row in self.rows if len(row) != len(self.columns)), None)
        if odd is not None:
            raise InputError(f"a row has {len(odd)} cells, and the table {len(self.columns)} columns: {odd}")


@dataclass(frozen=True)
class Figure:
    """A file with a picture under a heading, with a sentence that says what to see in it.

    Args:
        heading: a few words.
        path: a PNG, GIF, JPEG or SVG.
        caption: what to see.
        alt: what a reader who cannot see it has to know; the caption, unless given.
        data: the numbers that were drawn, as JSON takes them.
    """

    heading: str
    path: Path
    caption: str
    alt: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One answer: what was measured, how sure it is, and what it is held against.

    Args:
        question: in a few words, ``"What does it know?"``.
        measured: of what, how.
        value: a number, an :class:`~tdhook_rl.statistics.Interval`, or words.
        beside: controls by name: untrained, chance, shuffled, random.
        words: what follows from it, or what is missing.
        met: whether it is what was expected, where something was.
    """

    question: str
    measured: str
    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Findings:
    """The answer that a page opens with.

    Args:
        found: one row each.
        text: what to know about all of them.
        heading: above them.
    """

    found: Sequence[Finding]
    text: str = ""
    heading: str = "What was found"


@dataclass(frozen=True)
class Cautions:
    """What a reader has to know before believing it: what was not computed, was dropped, or is missing."""

    lines: Sequence[str]
    heading: str = "To be careful of"


@dataclass(frozen=True)
class Picture:
    """A picture or animation for a gallery.

    Args:
        content: the bytes of the file.
        ending: which kind of file, ``"png"``.
        caption: shown below it.
        alt: what it shows, in words.
    """

    content: bytes
    ending: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side.

    Args:
        heading: a few words.
        pictures: in order.
        text: what to see, and what was left out.
    """

    heading: str
    pictures: Sequence[Picture]
    text: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for: settings, versions. Nested ones are listed with dots."""

    heading: str
    facts: Mapping[str, Any]
    text: str = ""


@dataclass(frozen=True)
class Fragment:
    """HTML that stands in the page as it is, such as an episode player; it is trusted.

    Args:
        heading: a few words.
        html: a fragment that needs no network, and whose ids are its own.
        text: what to know about it.
    """

    heading: str
    html: str
    text: str = ""


@dataclass(frozen=True)
class Section:
    """Parts under one heading.

    Args:
        heading: a few words.
        parts: any parts, or texts as paragraphs.
        text: a sentence before them.
    """

    heading: str
    parts: Sequence[Any]
    text: str = ""
