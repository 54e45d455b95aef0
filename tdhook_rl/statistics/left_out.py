"""An interval for what is no mean: from how the figure changes where each group is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import Interval, check_confidence, limits, none


def jackknife(
    estimate: float, without: Any, *, rows: float, confidence: float = 0.95, correlation: bool = False
) -> Interval:
    """A t interval by group, from the figure without each of the groups (Tukey 1958; Efron & Stein 1981).

    It needs no draws, and holds for figures that resampling spoils: a state that is drawn twice is as near to itself as
    none is to another. Of figures between which differences do not matter it is too wide rather than too narrow.

    Args:
        estimate: the figure of all rows.
        without: ``(groups,)``: the figure without each of them.
        rows: how many rows there are.
        confidence: of the interval.
        correlation: the figure lies between -1 and 1, and the interval is found on Fisher's scale, within these.

    Raises:
        InputError: for no groups, or fewer rows than none.

    Example:
        >>> import numpy as np
        >>> values = np.arange(20.0)
        >>> found = jackknife(values.mean(), (values.sum() - values) / 19, rows=20)  # of a mean: the usual one
        >>> round(found.low, 3), round(found.high, 3)
        (6.731, 12.269)
    """
    check_confidence(confidence)
    left = np.asarray(without, dtype=np.float64).reshape(-1)
    if not len(left):
        raise InputError("without= has the figure without each group: there are none")
    if not rows >= 0:
        raise InputError(f"rows= is a number from 0 on, got {rows!r}")
    shape = {"confidence": confidence, "groups": len(left), "rows": rows}
    if not math.isfinite(estimate):
        return none(math.nan, "the figure is not defined", **shape)
    if len(left) < 2:
        return none(estimate, ONE_GROUP, **shape)
    if not np.isfinite(left).all():
        return none(estimate, "the figure is not defined without one of the groups", **shape)
    if correlation and math.isclose(abs(estimate), 1.0, rel_tol=0, abs_tol=1e-9):
        return limits(estimate, float(np.ptp(left) ** 2), freedom=len(left) - 1, **shape)  # the same but for rounding
    scaled, middle = left, estimate
    if correlation:
        with np.errstate(divide="ignore"):
            scaled, middle = np.arctanh(np.clip(left, -1, 1)), float(np.arctanh(np.clip(estimate, -1, 1)))
    if not (np.isfinite(scaled).all() and math.isfinite(middle)):
        return none(estimate, "the figure is at its bound, or is without one of the groups", **shape)
    variance = (len(left) - 1) / len(left) * float(np.square(scaled - scaled.mean()).sum())
    found = limits(middle, variance, freedom=len(left) - 1, words=few_groups(len(left), bounded=correlation), **shape)
    if not correlation:
        return replace(found, method="jackknife by group")
    return replace(
        found, estimate=estimate, low=math.tanh(found.low), high=math.tanh(found.high), method="jackknife by group"
    )
