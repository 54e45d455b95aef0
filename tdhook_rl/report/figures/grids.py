"""Numbers in rows and columns: probes by site and concept, by checkpoint, similarities of checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    Number,
    canvas,
    colour_bar,
    colour_map,
    framed,
    in_house_style,
    label,
    labels,
    limits,
    number,
    said,
)

#: Beyond so many columns numbers in cells could not be read.
_WRITTEN = 8


@in_house_style
def value_grid(
    cells: Mapping[str, Mapping[str, Number]],
    *,
    unit: str,
    marked: Collection[tuple[str, str]] = (),
    scale: float | None = None,
    most: int = 24,
    title: str = "",
    caption: str = "",
) -> Drawing:
    """A field for each row and column: the page's colour at 0, blue below, orange above; the number in it.

    Args:
        cells: numbers or intervals by row and by column; a cell that is absent or not finite is grey.
        unit: of the numbers, ``"trained minus untrained accuracy"``.
        marked: rows and columns whose numbers are in bold, such as those that are significant.
        scale: the number of full colour; the largest, unless given.
        most: how many rows and columns are shown, the first.
        title: of the drawing.
        caption: what to see; what was left out is added.

    Raises:
        InputError: without a cell.

    Example:
        >>> value_grid({"fc2": {"xor": 0.45, "door": -0.1}}, unit="trained minus untrained").alt
        'trained minus untrained, from -0.1 at fc2, door to 0.45 at fc2, xor.'
    """
    rows = list(cells)
    columns = list(dict.fromkeys(name for one in cells.values() for name in one))
    if not columns:
        raise InputError("a grid has a row and a column at least, got none")
    table = np.array([[limits(cells[row].get(column)) for column in columns] for row in rows], dtype=float)
    values = table[..., 0]
    shown = values[:most, :most]
    known = np.isfinite(shown)
    largest = float(np.abs(shown[known]).max()) if known.any() else 1.0
    scale = scale or largest or 1.0
    signed = bool((shown[known] < 0).any())
    # Two decimals of shares; of smaller numbers as many as the largest has two digits.
    places = max(2, 1 - int(np.floor(np.log10(largest)))) if largest else 2
    words = np.array([number(round(one, places) + 0.0) if np.isfinite(one) else "none" for one in shown.flat])
    written = shown.shape[1] <= _WRITTEN
    called = labels(rows[:most], 22)
    barred = not written or len(shown) > 3  # beside a few rows, which are written out, its numbers have no room
    if written:
        column = max(0.6, 0.2 + 0.075 * max(map(len, words)))
        wide = 0.4 + 0.075 * max(map(len, called)) + 0.75 * barred + column * shown.shape[1]
    else:
        wide = min(5.2, 1.5 + 0.42 * shown.shape[1])
    figure, axes = canvas(width=max(wide, 3.0), height=0.7 + 0.3 * len(shown) + (0.5 if not written else 0.25))
    axis = axes[0, 0]
    framed(axis)
    image = axis.imshow(
        np.where(known, shown, np.nan), cmap=colour_map(signed), vmin=-scale * signed, vmax=scale, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    slanted = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 6 or not written else {}
    )
    axis.set_xticks(range(shown.shape[1]), labels(columns[:most], 14), **slanted)
    axis.set_yticks(range(len(shown)), called)
    axis.tick_params(length=0)
    bold = set(marked)
    if written:
        for (at, place), text in np.ndenumerate(words.reshape(shown.shape)):
            weight = "bold" if (rows[at], columns[place]) in bold else "normal"
            axis.text(place, at, text, ha="center", va="center", fontsize=9, color=INK, weight=weight)
    else:
        spots = [(place, at) for at, row in enumerate(rows[:most]) for place, column in enumerate(columns[:most])
                 if (row, column) in bold]  # fmt: skip
        axis.scatter(*np.array(spots).reshape(-1, 2).T, marker="o", s=7, color=INK)
    axis.set_title(label(unit, 40), fontsize=9, loc="left")
    if barred:
        colour_bar(figure, image, axes.ravel().tolist(), "", aspect=18)
    left = len(rows) * len(columns) - shown.size
    more = f" {left} more cells are in the data." if left else ""
    return Drawing(
        figure=figure, title=title or unit, alt=_alt(cells, rows, columns, values, unit, bold),
        data=_data(cells, rows, columns, bold), caption=caption + more,
    )  # fmt: skip


def _alt(
    cells: Mapping[str, Mapping[str, Number]], rows: list[str], columns: list[str], values: np.ndarray, unit: str,
    marked: set[tuple[str, str]],
) -> str:  # fmt: skip
    if not np.isfinite(values).any():
        return f"{unit}: none of {values.size} cells is known."
    ends = []
    for find in (np.nanargmin, np.nanargmax):
        at, place = np.unravel_index(find(np.where(np.isfinite(values), values, np.nan)), values.shape)
        row, column = rows[int(at)], columns[int(place)]
        ends.append(f"{said(cells[row][column])} at {label(row, 60)}, {label(column, 60)}")
    text = f"{unit}, from {ends[0]} to {ends[1]}." if values.size > 1 else f"{unit}: {ends[0]}."
    names = [f"{label(row, 40)}, {label(column, 40)}" for row, column in sorted(marked)]
    shown = "; ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{text} Marked: {shown}." if names else text


def _data(
    cells: Mapping[str, Mapping[str, Number]], rows: list[str], columns: list[str], marked: set[tuple[str, str]]
) -> dict[str, Any]:
    tables = np.array([[limits(cells[row].get(column)) for column in columns] for row in rows], dtype=float)
    data: dict[str, Any] = {"rows": rows, "columns": columns, "cells": tables[..., 0]}
    known = np.argwhere(np.isfinite(tables[..., 1]))
    if len(known):
        data["intervals"] = [
            {"row": rows[at], "column": columns[place], "low": tables[at, place, 1], "high": tables[at, place, 2]}
            for at, place in known
        ]
    return data | ({"marked": [{"row": row, "column": column} for row, column in sorted(marked)]} if marked else {})
