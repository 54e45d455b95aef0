"""Tables that a run has logged: with intervals in one cell, and those that are figures too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tdhook_rl.report.contents.names import REVERSED, logged_interval
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import lines, value_grid
from tdhook_rl.report.page.numbers import is_number
from tdhook_rl.report.runs import Rows, Run

#: Columns that make a table one of probes, or a dose-response.
_PROBES, _DOSES = {"site", "concept", "trained"}, {"outcome", "alpha", "vector", "mean"}
_ENDS = ("_low", "_high")
#: Outcomes of a dose-response that are drawn.
_MOST = 4


def with_intervals(table: Rows) -> tuple[list[str], list[list[Any]]]:
    """The table with each number and its limits, ``rate``, ``rate_low`` and ``rate_high``, in one cell.

    Example:
        >>> columns, rows = with_intervals(Rows(0, ["rate", "rate_low", "rate_high"], [[0.5, 0.25, 0.75]]))
        >>> columns, str(rows[0][0])
        (['rate'], '0.500 (95%: 0.250 to 0.750; as logged, 0 groups)')
    """
    columns = [str(one) for one in table.columns]
    joined = {one for one in columns if all(f"{one}{end}" in columns for end in _ENDS)}
    kept = [one for one in columns if not any(one == f"{name}{end}" for name in joined for end in _ENDS)]
    rows = []
    for row in table.rows:
        if len(row) == len(columns):
            cells = dict(zip(columns, row, strict=True))
            rows.append([_cell(cells, one) if one in joined else cells[one] for one in kept])
    return kept, rows


def chances_of(run: Run) -> dict[str, float]:
    """What a guess scores, of each probe in the newest table of probes that says so, by the name of its numbers."""
    found: dict[str, float] = {}
    for listed in run.tables.values():
        columns = list(map(str, listed[-1].columns))
        if {"site", "concept", "chance"} <= set(columns):
            for row in listed[-1].rows:
                cells = dict(zip(columns, row, strict=False))
                if is_number(cells.get("chance")):
                    found[f"{cells['concept']}.{cells['site']}"] = float(cells["chance"])
    return found


def drawn_tables(run: Run) -> Iterator[tuple[str, Callable[[], Drawing]]]:
    """For the newest of each table that is a figure: what it is about, and what draws it."""
    for name, listed in run.tables.items():
        columns = set(map(str, listed[-1].columns))
        rows = [dict(zip(map(str, listed[-1].columns), row, strict=False)) for row in listed[-1].rows]
        if columns >= _PROBES and len({(row.get("site"), row.get("concept")) for row in rows}) > 1:
            yield "probes", lambda rows=rows: _grid(rows)
        elif columns >= _DOSES:
            outcomes = dict.fromkeys(str(row.get("outcome")) for row in rows)
            for outcome in list(outcomes)[:_MOST]:
                of = [row for row in rows if str(row.get("outcome")) == outcome and is_number(row.get("alpha"))]
                if of:
                    yield "doses", lambda of=of, outcome=outcome, name=name: _doses(of, outcome, name)


def _grid(rows: Sequence[dict[str, Any]]) -> Drawing:
    controlled = all(is_number(row.get("untrained")) for row in rows)
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        value = row["trained"] if is_number(row.get("trained")) else math.nan
        if controlled and is_number(row.get("trained")):
            value -= row["untrained"]
        cells.setdefault(str(row.get("site")), {})[str(row.get("concept"))] = value
    score = str(rows[0].get("score", "score"))
    unit = f"held-out {score}{', trained minus untrained' if controlled else ''}"
    return value_grid(cells, unit=unit, title="Which concepts can be read where")


def _doses(rows: Sequence[dict[str, Any]], outcome: str, name: str) -> Drawing:
    """A curve for each vector, from what is not steered on, and the band of the random directions of the first."""
    curves: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        start = [(0.0, *_limits(row, "baseline"))] if is_number(row.get("baseline")) else []
        curves.setdefault(str(row["vector"]), start).append((row["alpha"], *_limits(row, "mean")))
    first, caption = next(iter(curves)), ""
    band = [row for row in rows if str(row["vector"]) == first and is_number(row.get("random"))]
    if band:
        levels = [(row["alpha"], *(row["baseline"] + one for one in _limits(row, "random"))) for row in band]
        curves["random directions"] = [(0.0, *(band[0]["baseline"],) * 3), *levels]
        count = band[0].get("random_draws")
        caption = f"The band of random directions of equal norm is the range of {count or 'all'} of them."
    curves = {label: sorted(points) for label, points in curves.items()}
    return lines(curves, unit=outcome, axis="alpha", title=f"{name}: {outcome}", caption=caption)


def _limits(row: dict[str, Any], name: str) -> list[float]:
    values = [row.get(one) for one in (name, f"{name}_low", f"{name}_high")]
    return [float(value) if is_number(value) else math.nan for value in values]


def _cell(cells: dict[str, Any], name: str) -> Any:
    value, low, high = (cells[one] for one in (name, f"{name}_low", f"{name}_high"))
    if not is_number(value):
        return value
    low, high = (float(one) if is_number(one) else math.nan for one in (low, high))
    groups = cells.get("groups")
    why = REVERSED if low > high else "none was logged"
    return logged_interval(float(value), low, high, groups=int(groups) if is_number(groups) else 0, rows=0, why=why)
