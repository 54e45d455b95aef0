"""The same measured in several runs: every run, and the interquartile mean over them where there are enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.style import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    STYLES,
    Curve,
    Points,
    beside,
    canvas,
    drawn,
    in_house_style,
    label,
    labels,
    legend,
    points,
    tick_numbers,
    whole_ticks,
)
from tdhook_rl.statistics import iqm

#: With fewer runs an interval over runs would say more than is known.
ENOUGH = 4
#: Steps at which the mean over runs is taken.
STEPS = 40


@in_house_style
def seed_curves(
    runs: Mapping[str, Curve], *, unit: str, axis: str = "environment frames", title: str = "", caption: str = ""
) -> Drawing:
    """One curve of each run; from four runs on also their interquartile mean with its 95% interval, by run.

    Args:
        runs: curves by run; each as of :func:`probe_curves`.
        unit: of the values.
        axis: of the steps.
        title: of the drawing; the unit unless given.
        caption: what to see; what the interval rests on is added.

    Raises:
        InputError: for no run.

    Example:
        >>> drawing = seed_curves({"a": [(0, 0.1), (8, 0.9)], "b": [(0, 0.2), (8, 0.7)]}, unit="success")
        >>> drawing.alt
        'success of 2 runs: a ends at 0.9, b ends at 0.7.'
        >>> drawing.caption
        'Every run is shown; 2 are too few for an interval over runs.'
    """
    if not runs:
        raise InputError("there is no run to draw")
    found = {name: points(curve) for name, curve in runs.items()}
    figure, axes = canvas(height=2.9)
    place, entries = axes[0, 0], {}
    told = len(found) <= len(COLOURS) and len(found) < ENOUGH
    for number_, (name, curve) in enumerate(zip(labels(found, 40), found.values(), strict=True)):
        plain = Points(curve.x, curve.y, np.full_like(curve.y, np.nan), np.full_like(curve.y, np.nan))
        if told:
            look = {"colour": COLOURS[number_], "style": STYLES[number_], "marker": MARKERS[number_]}
            entries[name] = drawn(place, plain, **look)
        else:
            entries["one run"] = drawn(place, plain, colour=GREY, marker="", width=0.9)
    middle = _middle(found) if len(found) >= ENOUGH else None
    if middle is not None:
        entries["interquartile mean"] = drawn(place, middle, colour=BLUE, width=2.2)
    place.set(xlabel=axis, ylabel=beside(unit))
    whole_ticks(place)
    tick_numbers(place)
    legend(figure, entries)
    ends = [f"{label(name, 60)} ends at {curve.last[1]}" for name, curve in found.items()]
    more = f" and {len(ends) - 8} more" if len(ends) > 8 else ""
    words = (
        f"The band is a 95% interval over {len(found)} runs."
        if middle is not None
        else (
            ("Every run is shown" if len(found) > 1 else "One run")
            + (", over no common steps." if len(found) >= ENOUGH else _too_few(len(found)))
        )
    )
    mean = "" if middle is None else f" Their interquartile mean ends at {middle.last[1]}."
    return Drawing(
        figure=figure,
        title=title or unit,
        alt=f"{label(unit, 80)} of {len(found)} run{'s' if len(found) > 1 else ''}: {', '.join(ends[:8])}{more}.{mean}",
        data={
            "axis": axis,
            "unit": unit,
            "runs": {name: {"x": curve.x, "y": curve.y} for name, curve in found.items()},
            "interquartile mean": None if middle is None else middle.data,
        },
        caption=f"{caption} {words}".strip(),
    )


def _too_few(runs: int) -> str:
    return ": nothing says how runs differ." if runs == 1 else f"; {runs} are too few for an interval over runs."


def _middle(found: Mapping[str, Points]) -> Points | None:
    """The interquartile mean at some steps that all runs have reached."""
    known = [np.isfinite(curve.y) for curve in found.values()]
    pairs = [(curve.x[there], curve.y[there]) for curve, there in zip(found.values(), known, strict=True)]
    if not all(len(x) for x, _ in pairs):
        return None
    low, high = max(x[0] for x, _ in pairs), min(x[-1] for x, _ in pairs)
    steps = np.unique(np.concatenate([x for x, _ in pairs]))
    steps = steps[(steps >= low) & (steps <= high)]
    if not len(steps):
        return None
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int))]
    values = np.stack([np.interp(steps, x, y) for x, y in pairs])
    means = [iqm(column, resamples=500) for column in values.T]
    columns = zip(*((one.estimate, one.low, one.high) for one in means), strict=True)
    return Points(steps, *(np.array(column) for column in columns))
