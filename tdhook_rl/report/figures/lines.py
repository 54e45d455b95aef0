"""Lines over one axis: whatever was measured step by step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.style import (
    COLOURS,
    MARKERS,
    STYLES,
    Curve,
    beside,
    canvas,
    drawn,
    in_house_style,
    label,
    labels,
    legend,
    number,
    points,
    resting,
    tick_numbers,
    whole_ticks,
)


@in_house_style
def lines(
    curves: Mapping[str, Curve],
    *,
    unit: str,
    axis: str = "environment frames",
    title: str = "",
    of: str = "groups",
    caption: str = "",
) -> Drawing:
    """Up to five curves with their bands.

    Args:
        curves: by name; each as of :func:`probe_curves`.
        unit: of the values.
        axis: of the steps.
        title: of the drawing; the unit unless given.
        of: what the intervals are over, ``"episodes"``.
        caption: what to see; what the intervals rest on is added.

    Raises:
        InputError: for no curve, or more than five, which cannot be told apart.

    Example:
        >>> lines({"cue": [(0, 0.1), (8, 0.99)]}, unit="explained variance", axis="step").alt
        'explained variance, by step: cue goes from 0.1 to 0.99.'
    """
    if not 1 <= len(curves) <= len(COLOURS):
        raise InputError(f"a figure has 1 to {len(COLOURS)} curves that can be told apart, got {len(curves)}")
    found = {name: points(curve) for name, curve in curves.items()}
    figure, axes = canvas(height=2.9)
    entries = {}
    looks = zip(labels(found, 40), found.values(), COLOURS, STYLES, MARKERS, strict=False)
    for name, curve, colour, style, marker in looks:
        entries[name] = drawn(axes[0, 0], curve, colour=colour, style=style, marker=marker)
    axes[0, 0].set(xlabel=axis, ylabel=beside(unit))
    whole_ticks(axes[0, 0])
    tick_numbers(axes[0, 0])
    if len(found) > 1:
        legend(figure, entries)
    told = []
    for name, curve in found.items():
        known = curve.y[np.isfinite(curve.y)]
        start = f"from {number(float(known[0]))} to {curve.last[1]}" if len(known) else "nowhere: nothing is known"
        told.append(f"{label(name, 60)} goes {start}")
    groups = resting((one for curve in found.values() for one in curve.groups), of)
    return Drawing(
        figure=figure,
        title=title or unit,
        alt=f"{label(unit, 80)}, by {label(axis, 80)}: {'; '.join(told)}.",
        data={"axis": axis, "unit": unit, "curves": {name: curve.data for name, curve in found.items()}},
        caption=" ".join(word for word in (caption, groups) if word),
    )
