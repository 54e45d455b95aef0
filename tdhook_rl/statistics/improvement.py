"""How likely one condition is better than another."""

from __future__ import annotations

from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.interval import FEW_GROUPS, Interval, array, check_confidence, limits, none, pair_up
from tdhook_rl.statistics.means import grouped_mean


def probability_of_improvement(
    first: Any,
    second: Any,
    *,
    groups_first: Any = None,
    groups_second: Any = None,
    paired: bool = False,
    confidence: float = 0.95,
) -> Interval:
    """The chance that a value of ``second`` is larger than one of ``first``, ties by half (Mann & Whitney 1947;
    Agarwal, Schwarzer, Castro, Courville & Bellemare 2021, NeurIPS).

    Args:
        first, second: ``(rows,)`` each; a pair in each row with ``paired``.
        groups_first, groups_second: the group of each row; groups of the two are independent. With ``paired``, give the
            first.
        paired: compare within pairs instead of all with all.
        confidence: of the interval, by the variance of DeLong, DeLong & Clarke-Pearson 1988 by group.

    Raises:
        InputError: for no rows, NaN, or pairs that do not pair up.

    Example:
        >>> probability_of_improvement([1.0, 2.0, 3.0], [2.5, 3.5, 4.5]).estimate.__round__(3)
        0.889
    """
    check_confidence(confidence)
    before, after = array(first, "values"), array(second, "values")
    if not len(before) or not len(after):
        raise InputError(f"there is nothing to compare: {len(before)} and {len(after)} rows")
    if paired:
        if len(before) != len(after):
            raise InputError(f"pairs have one value on each side, got {len(before)} and {len(after)}")
        better = 0.5 + 0.5 * np.sign(after - before)
        return grouped_mean(better, groups_first, confidence=confidence, method="t", bounds=(0.0, 1.0))
    below, above = _shares(before, after), 1 - _shares(after, before)  # of each second, of each first
    estimate = float(below.mean())
    parts, freedoms, counts = [], [], []
    for shares, groups in ((above, groups_first), (below, groups_second)):
        numbers = pair_up(len(shares), groups)
        residuals = np.bincount(numbers, shares - estimate) / len(shares)
        counts.append(len(residuals))
        parts.append(float(np.square(residuals).sum()) * len(residuals) / max(len(residuals) - 1, 1))
        freedoms.append(max(len(residuals) - 1, 1))
    shape = {"confidence": confidence, "groups": sum(counts), "rows": len(before) + len(after)}
    fewest = min(counts)
    if fewest < 2:
        return none(estimate, "one group only on a side: nothing says how much groups differ", **shape)
    total = sum(parts)
    freedom = (
        total**2 / sum(part**2 / free for part, free in zip(parts, freedoms, strict=True)) if total else fewest - 1
    )
    words = f"only {fewest} groups on a side: a t interval by group" if fewest < FEW_GROUPS else ""
    # A separation without exception says no more than the smaller side.
    return limits(estimate, total, freedom=freedom, bounds=(0.0, 1.0), alike=fewest, words=words, **shape)


def _shares(of: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each value of ``at``, the share of ``of`` below it, ties by half."""
    ordered = np.sort(of)
    return (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(of))
