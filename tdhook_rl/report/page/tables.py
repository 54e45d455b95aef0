"""Tables that sort, and the findings that a page opens with."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdhook_rl.report.page.numbers import is_number, shown
from tdhook_rl.report.page.parts import Cautions, Facts, Findings, Table
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
    long = [any(len(_words(row[place])) > LONG for row in rows) for place in range(len(columns))]
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


# ------------------------------------------------------------------ what a page opens with


def findings(part: Findings, place: Place) -> str:
    """The answers in a table, each drawn with its limits and controls where all of them lie between 0 and 1."""
    heading = place.heading(part.heading)
    judged = any(one.met is not None for one in part.found)
    noted = any(one.words for one in part.found)
    scaled = any(_scale(one.value, one.beside) for one in part.found)
    columns = ["Question", "Measured", "Found", *(["0 to 1"] if scaled else []), "Beside it"]
    columns += [*(["Note"] if noted else []), *(["As expected"] if judged else [])]
    rows = []
    for one in part.found:
        beside = "; ".join(f"{name} {shown(value)}" for name, value in one.beside.items()) or "-"
        cells = [
            f'<th scope="row">{html.escape(one.question)}</th>',
            _cell(one.measured, True),
            _cell(one.value, False),
            *([f"<td data-nothing>{_scale(one.value, one.beside)}</td>"] if scaled else []),
            _cell(beside, True),
            *([_cell(one.words, True)] if noted else []),
            *([_cell(one.met, False)] if judged else []),
        ]
        rows.append("".join(cells))
    long = {"Measured", "Beside it", "Note"}
    head = "".join(f'<th scope="col"{" class=long" if one in long else ""}>{one}</th>' for one in columns)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    names = ["question", "measured", "found", "beside", "note", "as expected"]
    data = as_csv(names, [
        [one.question, one.measured, one.value, "; ".join(f"{k} {shown(v)}" for k, v in one.beside.items()), one.words,
         one.met] for one in part.found
    ])  # fmt: skip
    legend = " Dot: what was found; bar: its interval; rings: what it is held against." if scaled else ""
    label = html.escape(part.heading, quote=True)
    return (
        f'{heading}{_text(part.text)}<div class="box" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="sorts"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
        f'<p class="beside">Data: {data_link(part.heading, data, "csv")}{legend}</p>\n'
    )


def _scale(value: Any, beside: Mapping[str, Any]) -> str:
    """A line from 0 to 1 with the value, its limits, and its controls; empty where they are no shares."""
    figure = value.estimate if isinstance(value, Interval) else value
    controls = {name: float(one) for name, one in beside.items() if is_number(one) or isinstance(one, Interval)}
    if not is_number(figure) or not all(0 <= one <= 1 for one in (figure, *controls.values())):
        return ""
    if not controls and not (isinstance(value, Interval) and value.known):
        return ""
    limits = ""
    if isinstance(value, Interval) and value.known:
        low, high = (min(max(one, 0.0), 1.0) for one in (value.low, value.high))
        limits = f'<line class="limits" x1="{100 * low:.1f}" x2="{100 * high:.1f}" y1="10" y2="10"/>'
    rings = "".join(
        f'<circle class="control" cx="{100 * one:.1f}" cy="10" r="3.5"><title>{html.escape(name)} {one:.3f}</title>'
        "</circle>"
        for name, one in controls.items()
    )
    ends = "".join(f'<line class="axis" x1="{x}" x2="{x}" y1="5" y2="15"/>' for x in (0, 50, 100))
    return (
        '<svg class="scale" viewBox="-5 0 110 20" aria-hidden="true">'
        f'<line class="axis" x1="0" x2="100" y1="10" y2="10"/>{ends}{rings}'
        f'{limits}<circle class="value" cx="{100 * figure:.1f}" cy="10" r="4"/></svg>'
    )


def cautions(part: Cautions, place: Place) -> str:
    """A box with a line for each."""
    if not part.lines:
        return ""
    lines = "".join(f"<li>{html.escape(line)}</li>\n" for line in part.lines)
    return f'<section class="cautions">{place.heading(part.heading)}<ul>{lines}</ul></section>\n'


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
