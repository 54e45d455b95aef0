"""What an intervention does at each strength, beside random ones, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    STYLES,
    Number,
    array,
    canvas,
    drawn,
    in_house_style,
    label,
    legend,
    number,
    points,
    resting,
    said,
)
from tdhook_rl.statistics import Interval


@in_house_style
def dose_curve(
    strengths: Sequence[float],
    response: Sequence[Number],
    *,
    random: Any = None,
    competence: Mapping[str, Sequence[Number]] | None = None,
    outcome: str = "episodes with the outcome",
    axis: str = "alpha (in units of the vector)",
    title: str = "Changing its mind",
    of: str = "episodes",
    caption: str = "",
) -> Drawing:
    """The rate of an outcome by strength, that of random directions, and what is left of competence.

    Args:
        strengths: of the intervention.
        response: of each strength the rate, best an :class:`~tdhook_rl.statistics.Interval`.
        random: ``(directions, strengths)``: the same of random directions of equal norm.
        competence: rates that should not suffer, by name.
        outcome: what is counted.
        axis: of the strengths.
        title: of the drawing.
        of: what the intervals are over.
        caption: what to see; what the intervals and the band are is added.

    Raises:
        InputError: for other numbers of rates than strengths.

    Example:
        >>> dose_curve([0, 1], [0.02, 0.97], random=[[0.02, 0.05], [0.02, 0.01]], outcome="P(other corner)").alt
        'P(other corner) goes from 0.02 at 0 to 0.97 at 1; 2 random directions: 0.01 to 0.05 at 1.'
    """
    controls = None if random is None else np.atleast_2d(array(random))
    rows = {"the response": response, **(competence or {})} | ({} if controls is None else {"random": controls.T})
    for name, values in rows.items():
        if len(values) != len(strengths) or not len(strengths):
            raise InputError(f"there are {len(strengths)} strengths and {len(values)} rates of {name}")
    figure, axes = canvas(height=3.0)
    entries = fill_doses(axes[0, 0], strengths, response, random=controls, competence=competence)
    axes[0, 0].set(xlabel=axis, ylabel=outcome)
    legend(figure, entries)
    estimates = [*response, *(one for values in (competence or {}).values() for one in values)]
    words = [caption, resting((one.groups for one in estimates if isinstance(one, Interval) and one.known), of)]
    if controls is not None:
        words.append(f"The grey band is the range of {len(controls)} random directions, the line in it their mean.")
    return Drawing(
        figure=figure,
        title=title,
        alt=_in_words(strengths, response, controls, competence or {}, outcome),
        data={
            "strengths": list(strengths),
            "outcome": outcome,
            "response": list(response),
            "random": controls,
            "competence": {name: list(values) for name, values in (competence or {}).items()},
        },
        caption=" ".join(word for word in words if word),
    )


def fill_doses(
    axis: Any,
    strengths: Sequence[float],
    response: Sequence[Number],
    *,
    random: np.ndarray | None = None,
    competence: Mapping[str, Sequence[Number]] | None = None,
) -> dict[str, Any]:
    """Draw the curves; returns the entries of a legend."""
    entries: dict[str, Any] = {}
    order = np.argsort(np.asarray(strengths, dtype=float), kind="stable")
    if random is not None and len(random):
        shown = random[:, order]
        x = np.asarray(strengths, dtype=float)[order]
        # The range of a few directions may be a line: its edges are drawn, or it would not be seen.
        axis.fill_between(x, shown.min(0), shown.max(0), facecolor=GREY, edgecolor=GREY, alpha=0.3, linewidth=2)
        (entries[f"{len(random)} random directions"],) = axis.plot(
            x, shown.mean(0), color=GREY, linestyle=STYLES[1], linewidth=1.4
        )
    for place, (name, values) in enumerate((competence or {}).items()):
        entries[label(name)] = drawn(
            axis, points(list(zip(strengths, values, strict=True))), colour=GREEN, style=STYLES[2 + place % 3],
            marker=MARKERS[1 + place % 4],
        )  # fmt: skip
    found = points(list(zip(strengths, response, strict=True)))
    entries = {"the vector": drawn(axis, found, colour=BLUE, marker=MARKERS[0])} | entries
    values = [side for side in (found.y, found.low, found.high) if np.isfinite(side).any()]
    if all(np.nanmin(side) >= 0 and np.nanmax(side) <= 1 for side in values):
        axis.set_ylim(-0.04, 1.04)
    return entries


def _in_words(
    strengths: Sequence[float],
    response: Sequence[Number],
    random: np.ndarray | None,
    competence: Mapping[str, Sequence[Number]],
    outcome: str,
) -> str:
    order = np.argsort(np.asarray(strengths, dtype=float), kind="stable")
    first, last = int(order[0]), int(order[-1])
    low, high = number(float(strengths[first])), number(float(strengths[last]))
    parts = [f"{label(outcome, 80)} goes from {said(response[first])} at {low} to {said(response[last])} at {high}"]
    if random is not None and len(random):
        end = random[:, last]
        parts.append(f"{len(random)} random directions: {number(end.min())} to {number(end.max())} at {high}")
    for name, values in competence.items():
        parts.append(f"{label(name, 60)} goes from {said(values[first])} to {said(values[last])}")
    return "; ".join(parts) + "."
