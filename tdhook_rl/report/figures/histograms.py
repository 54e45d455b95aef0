"""How values are distributed, and how that changes while the agent trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    STYLES,
    beside,
    canvas,
    colour_bar,
    colour_map,
    digits,
    framed,
    in_house_style,
    label,
    legend,
    number,
    tick_numbers,
    whole_ticks,
)

_BINS, _TIMES = 60, 120


@in_house_style
def histograms_over_time(
    records: Iterable[Mapping[str, Any]],
    *,
    unit: str = "activation",
    axis: str = "environment frames",
    title: str = "",
    caption: str = "",
) -> Drawing:
    """A column for each histogram, darker where more values lie; with the median and the middle 90%.

    Args:
        records: ``{"step": ..., "counts": [...], "edges": [...]}``, as the lines of ``histograms.jsonl`` have them,
            of one name. Each may have edges of its own.
        unit: of the values.
        axis: of the steps.
        title: of the drawing; the unit unless given.
        caption: what to see; what was left out is added.

    Raises:
        InputError: without a histogram that holds a value, or for other numbers of counts than bins.

    Example:
        >>> lines = [{"step": 100, "counts": [1, 3], "edges": [0.0, 1.0, 2.0]}]
        >>> histograms_over_time(lines, unit="fc2").alt
        'fc2: at 100 the median is 1.33, and 90% lie between 0.2 and 1.93.'
    """
    found = sorted((_record(one) for one in records), key=lambda one: one[0])
    found = [one for one in found if one[1].sum() > 0]
    if not found:
        raise InputError("there is no histogram that holds a value")
    if len(found) > _TIMES:
        found = [found[at] for at in np.linspace(0, len(found) - 1, _TIMES).round().astype(int)]
    steps = np.array([step for step, _, _ in found])
    low, middle, high = np.array([_quantiles(counts, edges, (0.05, 0.5, 0.95)) for _, counts, edges in found]).T
    # A few far values would leave the rest in one line.
    ends = np.array([_quantiles(counts, edges, (0.002, 0.998)) for _, counts, edges in found])
    bottom, top = float(ends[:, 0].min()), float(ends[:, 1].max())
    if top - bottom <= 1e-9 * max(abs(top), abs(bottom), 1e-300):
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)
    grid = np.linspace(bottom, top, _BINS + 1)
    shares = np.array([_shares(counts, edges, grid) for _, counts, edges in found])
    figure, axes = canvas(height=2.9)
    panel = axes[0, 0]
    sides = _sides(steps)
    # The root shows what is rare beside what is frequent.
    image = panel.pcolormesh(sides, grid, np.sqrt(shares.T), cmap=colour_map(False), vmin=0, rasterized=True)
    entries: dict[str, Any] = {}
    (entries["median"],) = panel.plot(steps, middle, color=INK, linewidth=1.6, marker="o" if len(steps) == 1 else "")
    for side in (low, high):
        (entries["middle 90%"],) = panel.plot(
            steps, side, color=INK, linewidth=1.1, linestyle=STYLES[1], marker="_" if len(steps) == 1 else ""
        )
    panel.set(xlabel=axis, ylabel=beside(unit), xlim=(sides[0], sides[-1]), ylim=(bottom, top))
    framed(panel)
    if len(steps) == 1:  # the column is as wide as the panel: other ticks would say nothing
        panel.set_xticks(steps)
    else:
        whole_ticks(panel)
    tick_numbers(panel)
    tick_numbers(panel, "y")
    most = float(shares.max())
    bar = colour_bar(figure, image, panel, "share of values in a bin", aspect=18, ticks=np.sqrt([0, most / 4, most]))
    bar.ax.set_yticklabels([f"{number(float(f'{100 * share:.2g}'))}%" for share in (0, most / 4, most)])
    legend(figure, entries)
    outside = 1 - float(shares.sum(1).min())
    words = [caption]
    if outside > 0.0005:
        words.append(f"At most {100 * outside:.1f}% of the values of a step lie outside.")
    return Drawing(
        figure=figure,
        title=title or label(unit, 60),
        alt=_in_words(unit, steps, low, middle, high),
        data={
            "unit": unit,
            "axis": axis,
            "step": steps,
            "median": middle,
            "5%": low,
            "95%": high,
            "edges": grid,
            "shares": digits(shares),
        },
        caption=" ".join(word for word in words if word),
    )


def _record(one: Mapping[str, Any]) -> tuple[float, np.ndarray, np.ndarray]:
    counts, edges = np.asarray(one["counts"], dtype=float), np.asarray(one["edges"], dtype=float)
    if counts.ndim != 1 or len(edges) != len(counts) + 1 or not len(counts):
        raise InputError(f"a histogram has one edge more than counts, got {len(edges)} and {len(counts)}")
    return float(one["step"]), counts, edges


def _quantiles(counts: np.ndarray, edges: np.ndarray, at: tuple[float, ...]) -> np.ndarray:
    """Where such shares of the values lie below, if values lie evenly in their bins; never in an empty one."""
    held = np.flatnonzero(counts)
    shares = counts[held] / counts.sum()
    ends = np.cumsum(shares)
    place = np.searchsorted(ends, at).clip(max=len(held) - 1)
    within = ((np.array(at) - ends[place]) / shares[place] + 1).clip(0, 1)
    return edges[held[place]] + within * np.diff(edges)[held[place]]


def _shares(counts: np.ndarray, edges: np.ndarray, grid: np.ndarray) -> np.ndarray:
    below = np.interp(grid, edges, np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum())
    return np.diff(below)


def _sides(steps: np.ndarray) -> np.ndarray:
    """Where columns begin and end: half way between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - between[0]], between, [2 * steps[-1] - between[-1]]])


def _in_words(unit: str, steps: np.ndarray, low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> str:
    def at(place: int) -> str:
        return (
            f"at {number(float(steps[place]))} the median is {number(float(middle[place]))}, and 90% lie between "
            f"{number(float(low[place]))} and {number(float(high[place]))}"
        )

    return f"{label(unit, 80)}: {at(0)}" + (f"; {at(-1)}." if len(steps) > 1 else ".")
