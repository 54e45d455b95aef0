"""What an intervention does at each strength, beside random ones, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    PURPLE,
    STYLES,
    Number,
    array,
    beside,
    canvas,
    drawn,
    in_house_style,
    label,
    labels,
    legend,
    limits,
    number,
    points,
    resting,
    said,
)
from tdhook_rl.statistics import Interval

#: What stands in for the vector: how it is called, its colour and line.
_CONTROLS = {"random": ("random directions", GREY, STYLES[1]), "shuffled": ("shuffled labels", PURPLE, ":")}


@in_house_style
def dose_curve(
    strengths: Sequence[float],
    response: Sequence[Number],
    *,
    random: Any = None,
    shuffled: Any = None,
    runs: Mapping[str, Sequence[float]] | None = None,
    half: Number | None = None,
    competence: Mapping[str, Sequence[Number]] | None = None,
    outcome: str = "episodes with the outcome",
    axis: str = "alpha (in units of the vector)",
    title: str = "Changing its mind",
    of: str = "episodes",
    caption: str = "",
) -> Drawing:
    """An outcome by strength, that of random directions, and what is left of competence.

    Competence stands in the same axes where all are shares from 0 to 1, and else below.

    Args:
        strengths: of the intervention.
        response: of each strength the rate, best an :class:`~tdhook_rl.statistics.Interval`.
        random: ``(directions, strengths)``: the same of random directions of equal norm.
        shuffled: ``(directions, strengths)``: the same of what shuffled labels give.
        runs: the response in each of several training runs, by name.
        half: the strength at which half of the effect at the largest is reached.
        competence: what should not suffer, by name.
        outcome: what is counted.
        axis: of the strengths.
        title: of the drawing.
        of: what the intervals are over.
        caption: what to see; what the intervals and the bands are is added.

    Raises:
        InputError: for other numbers of rates than strengths.

    Example:
        >>> dose_curve([0, 1], [0.02, 0.97], random=[[0.02, 0.05], [0.02, 0.01]], outcome="P(other corner)").alt
        'P(other corner) goes from 0.02 at 0 to 0.97 at 1; 2 random directions: 0.01 to 0.05 at 1.'
    """
    given = {"random": random, "shuffled": shuffled}
    controls = {name: np.atleast_2d(array(one)) for name, one in given.items() if one is not None and len(one)}
    competence, runs = competence or {}, runs or {}
    rows = {"the response": response, **competence, **runs} | {name: one.T for name, one in controls.items()}
    for name, values in rows.items():
        if len(values) != len(strengths) or not len(strengths):
            raise InputError(f"there are {len(strengths)} strengths and {len(values)} rates of {name}")
    below = {} if _shares([*response, *(one for values in competence.values() for one in values)]) else competence
    figure, axes = canvas(
        1 + len(below), 1, height=3.0 + 1.3 * len(below), sharex=True, height_ratios=[1.0] + [0.5] * len(below)
    )
    entries = fill_doses(
        axes[0, 0], strengths, response, **controls, runs=runs, half=half, competence={} if below else competence
    )
    axes[0, 0].set(ylabel=beside(outcome, 20))
    for place, (panel, (name, values)) in enumerate(zip(axes[1:, 0], below.items(), strict=True)):
        _fill_competence(panel, strengths, {name: values}, first=place)
        panel.set_title(label(name, 60), loc="left", pad=3)
    axes[-1, 0].set(xlabel=axis)
    legend(figure, entries)
    estimates = [*response, *(one for values in competence.values() for one in values)]
    words = [caption, resting((one.groups for one in estimates if isinstance(one, Interval) and one.known), of)]
    colours = {"random": "grey", "shuffled": "purple"}
    words += [
        f"The {colours[name]} band is the range of {len(one)} {_CONTROLS[name][0]}, the line in it their mean."
        for name, one in controls.items()
    ]
    words += [f"Thin lines are the {len(runs)} training runs."] * bool(runs)
    return Drawing(
        figure=figure,
        title=title,
        alt=_in_words(strengths, response, controls, competence, outcome, half),
        data={
            "strengths": list(strengths),
            "outcome": outcome,
            "response": list(response),
            "random": controls.get("random"),
            "shuffled": controls.get("shuffled"),
            "runs": {name: list(values) for name, values in runs.items()},
            "half": half,
            "competence": {name: list(values) for name, values in competence.items()},
        },
        caption=" ".join(word for word in words if word),
    )


def fill_doses(
    axis: Any,
    strengths: Sequence[float],
    response: Sequence[Number],
    *,
    random: np.ndarray | None = None,
    shuffled: np.ndarray | None = None,
    runs: Mapping[str, Sequence[float]] | None = None,
    half: Number | None = None,
    competence: Mapping[str, Sequence[Number]] | None = None,
) -> dict[str, Any]:
    """Draw the curves; returns the entries of a legend."""
    entries: dict[str, Any] = {}
    order = np.argsort(np.asarray(strengths, dtype=float), kind="stable")
    x = np.asarray(strengths, dtype=float)[order]
    for name, one in (("random", random), ("shuffled", shuffled)):
        if one is None or not len(one):
            continue
        words, colour, style = _CONTROLS[name]
        shown = one[:, order]
        # The range of a few directions may be a line: its edges are drawn, or it would not be seen.
        axis.fill_between(x, shown.min(0), shown.max(0), facecolor=colour, edgecolor=colour, alpha=0.3, linewidth=2)
        (entries[f"{len(one)} {words}"],) = axis.plot(x, shown.mean(0), color=colour, linestyle=style, linewidth=1.4)
    for values in (runs or {}).values():
        (entries["one run"],) = axis.plot(x, array(values)[order], color=BLUE, linewidth=0.8, alpha=0.55)
    entries |= _fill_competence(axis, strengths, competence or {})
    found = points(list(zip(strengths, response, strict=True)))
    entries = {"the vector": drawn(axis, found, colour=BLUE, marker=MARKERS[0])} | entries
    middle, low, high = limits(half)
    known = found.y[(found.x >= 0) & np.isfinite(found.y)]
    if np.isfinite(middle) and len(known) > 1:
        level = (known[0] + known[-1]) / 2
        if np.isfinite(low) and np.isfinite(high):
            axis.hlines(level, low, high, color=INK, linewidth=1.4, zorder=4)
        axis.scatter([middle], [level], marker="D", s=30, color=INK, zorder=5)
        (entries["half of its effect"],) = axis.plot([], [], color=INK, marker="D", markersize=5, linewidth=1.4)
    if _shares(response):
        axis.set_ylim(-0.04, 1.04)
    return entries


def _fill_competence(
    axis: Any, strengths: Sequence[float], competence: Mapping[str, Sequence[Number]], first: int = 0
) -> dict[str, Any]:
    called = iter(labels(competence, taken=["the vector", "one run", "half of its effect"]))
    return {
        next(called): drawn(
            axis, points(list(zip(strengths, values, strict=True))), colour=GREEN, style=STYLES[2 + place % 3],
            marker=MARKERS[1 + place % 4],
        )
        for place, (name, values) in enumerate(competence.items(), start=first)
    }  # fmt: skip


def _shares(values: Iterable[Number]) -> bool:
    """Whether all that is known lies from 0 to 1."""
    found = np.array([limits(one) for one in values], dtype=float)
    found = found[np.isfinite(found)]
    return bool(len(found) == 0 or (found.min() >= 0 and found.max() <= 1))


def _in_words(
    strengths: Sequence[float],
    response: Sequence[Number],
    controls: Mapping[str, np.ndarray],
    competence: Mapping[str, Sequence[Number]],
    outcome: str,
    half: Number | None,
) -> str:
    order = np.argsort(np.asarray(strengths, dtype=float), kind="stable")
    first, last = int(order[0]), int(order[-1])
    low, high = number(float(strengths[first])), number(float(strengths[last]))
    parts = [f"{label(outcome, 80)} goes from {said(response[first])} at {low} to {said(response[last])} at {high}"]
    if half is not None and np.isfinite(float(half)):
        parts.append(f"half of it at {said(half)}")
    for name, one in controls.items():
        end = one[:, last]
        parts.append(f"{len(one)} {_CONTROLS[name][0]}: {number(end.min())} to {number(end.max())} at {high}")
    for name, values in competence.items():
        parts.append(f"{label(name, 60)} goes from {said(values[first])} to {said(values[last])}")
    return "; ".join(parts) + "."
