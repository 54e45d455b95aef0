"""Tables that sort, and lists of facts."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdhook_rl.report.page.numbers import is_number, shown
from tdhook_rl.report.page.parts import Facts, Table
from tdhook_rl.report.page.place import Place
from tdhook_rl.report.page.saved import as_csv, data_link
from tdhook_rl.statistics import Interval

#: Rows that are shown; all of them are in the CSV file. From so many on there is a field to filter them.
MOST_ROWS, FILTERED = 1000, 25
#: Boxes of more rows scroll down as well.
TALL = 16
#: Longer cells are given room.
LONG = 28


def table(part: Table, place: Place) -> str:
    """A table in a box of its own, which scrolls where the page is narrow."""
    heading = place.heading(part.heading)
    one = place.id(f"table {part.heading}")
    rows = part.rows[:MOST_ROWS]
    left = len(part.rows) - len(rows)
    said = f' <span class="soft">{left:,} more rows are in the file.</span>' if left else ""
    field = ""
    if len(rows) >= FILTERED:
        field = (
            f'<input class="filter" type="search" hidden data-table="{one}" placeholder="Show rows with ..." '
            f'aria-label="Show rows with this text">'
        )
    link = data_link(part.heading or "table", as_csv(part.columns, part.rows), "csv")
    return (
        f"{heading}{_text(part.text)}{field}{_box(one, part.heading or 'Table', part.columns, rows)}"
        f'<p class="beside">Data: {link}{said}</p>\n'
    )


def _box(one: str, label: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    long = [
        any(len(text) > LONG for text in (name, *(_words(row[place]) for row in rows)))
        for place, name in enumerate(columns)
    ]
    head = "".join(
        f'<th scope="col"{" class=long" if is_long else ""}>{html.escape(name)}</th>'
        for name, is_long in zip(columns, long, strict=True)
    )
    body = "\n".join(f"<tr>{_row(row, long)}</tr>" for row in rows)
    tall = " tall" if len(rows) > TALL else ""
    return (
        f'<div class="box{tall}" tabindex="0" role="region" aria-label="{html.escape(label, quote=True)}">'
        f'<table class="sorts" id="{one}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def _row(row: Sequence[Any], long: Sequence[bool]) -> str:
    cells = [_cell(value, is_long) for value, is_long in zip(row, long, strict=True)]
    if row and isinstance(row[0], str):
        cells[0] = cells[0].replace("<td", '<th scope="row"', 1).removesuffix("</td>") + "</th>"
    return "".join(cells)


def _cell(value: Any, long: bool) -> str:
    text = _words(value)
    figure = value.estimate if isinstance(value, Interval) else value
    marks, kinds = "", ["long"] if long else []
    if is_number(figure):
        kinds.append("num")
        known = math.isfinite(figure)
        marks = f' data-value="{float(figure)!r}"' if known else " data-nothing"
    elif value is None or text == "":
        marks = " data-nothing"
    elif text in ("yes", "no"):
        kinds.append(text)
    elif text[:1].isdigit() or text[:1] == "-":  # numbers that are written out already
        kinds.append("num") if len(text) <= LONG else None
    if isinstance(value, Interval) and not value.known:
        kinds = [kind for kind in kinds if kind != "num"]
    names = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{names}{marks}>{html.escape(text)}</td>"


def _words(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _text(text: str) -> str:
    return f'<p class="text">{html.escape(text)}</p>\n' if text else ""


def facts(part: Facts, place: Place) -> str:
    """Names and what they stand for."""
    if not part.facts:
        return ""
    lines = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>\n" for name, text in _flat(part.facts, "")
    )
    return f"{place.heading(part.heading)}{_text(part.text)}<dl>{lines}</dl>\n"


def _flat(known: Mapping[str, Any], before: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in known.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and before.count(".") < 3:
            found += _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value)) or "-"))
        else:
            # Seeds and sizes are given as they are; a seed of 81,920 would be no seed.
            found.append((name, "-" if value is None else str(value)))
    return [(name, text if len(text) <= 600 else f"{text[:600]} ...") for name, text in found[:400]]
