"""Differences of two scores of the same groups: trained and untrained, true labels and shuffled ones.

What the groups have in common cancels, so that the interval of the difference is narrower than those of the scores let
one think, and may be wider where they disagree.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.interval import (
    FEW_GROUPS,
    ONE_GROUP,
    Interval,
    check_confidence,
    limits,
    none,
    real_numbers,
    tables,
)


def accuracy_difference(
    right: Any, rows: Any, other_right: Any, other_rows: Any, *, confidence: float = 0.95
) -> Interval:
    """The balanced accuracy of one classifier minus that of another, by group.

    Args:
        right, rows: ``(groups, classes)``: of the first, as of :func:`balanced_accuracy`.
        other_right, other_rows: of the second, the same groups in the same order; its classes may be others.
        confidence: of the interval.

    Returns:
        the interval; NaN, and why in words, where one of the two cannot be had.

    Example:
        >>> found = accuracy_difference([[9, 8], [9, 9], [8, 9]], [[10, 10]] * 3, [[5, 6], [5, 5], [4, 5]],
        ...                             [[10, 10]] * 3)
        >>> round(found.estimate, 3), found.groups
        (0.367, 3)
    """
    parts = [_accuracy(right, rows), _accuracy(other_right, other_rows)]
    return _difference(parts, rows=float(real_numbers(rows, "counts").sum()), confidence=confidence)


def r_squared_difference(sums: Any, other_sums: Any, *, confidence: float = 0.95) -> Interval:
    """The share of variance that one prediction explains minus that of another, by group.

    Args:
        sums, other_sums: ``(groups, 4)``, as of :func:`r_squared`, the same groups in the same order.
        confidence: of the interval.

    Example:
        >>> r_squared_difference([[2, 0.0, 4.0, 1.0]] * 3, [[2, 0.0, 4.0, 3.0]] * 3).estimate
        0.5
    """
    parts = [_explained(sums), _explained(other_sums)]
    return _difference(parts, rows=float(real_numbers(sums, "sums")[:, 0].sum()), confidence=confidence)


#: A score, what each group adds to it about its mean, variance that the groups do not show, and as how many groups of
#: one size they count.
_Part = tuple[float, np.ndarray, float, float]


def _accuracy(right: Any, rows: Any) -> _Part:
    right, rows = tables(right, rows, "counts", "classes")
    there = rows.sum(0) > 0
    groups = len(rows)
    if there.sum() < 2:
        return math.nan, np.zeros(groups), 0.0, 0.0
    right, rows = right[:, there], rows[:, there]
    total, counts = rows.sum(0), np.maximum((rows > 0).sum(0), 2)
    shares = right.sum(0) / total
    residuals = (right - shares * rows) / total * np.sqrt(counts / (counts - 1))
    # A class without an error is not one that cannot err; see balanced_accuracy.
    effective = total**2 / np.square(rows).sum(0)
    smooth = (effective * shares + 1) / (effective + 2)
    faultless = np.minimum(right.sum(0), total - right.sum(0)) < 1
    floor = np.where(faultless, smooth * (1 - smooth) / (effective + 2), 0.0)
    unseen = np.maximum(floor - np.square(residuals).sum(0), 0).sum()
    return float(shares.mean()), residuals.mean(1), float(unseen) / len(shares) ** 2, float(effective.min())


def _explained(sums: Any) -> _Part:
    sums = real_numbers(sums, "sums")
    if sums.ndim != 2 or sums.shape[1] != 4:
        raise InputError(f"sums are (groups, 4), got {sums.shape}")
    rows, values, squares, errors = sums.T
    groups = int((rows > 0).sum())
    if not groups:
        return math.nan, np.zeros(len(sums)), 0.0, 0.0
    mean = values.sum() / rows.sum()
    about = squares - 2 * mean * values + mean**2 * rows
    total = about.sum()
    if total <= 1e-12 * max(squares.sum(), 1e-300):
        return math.nan, np.zeros(len(sums)), 0.0, 0.0
    share = float(errors.sum() / total)
    effective = float(rows.sum() ** 2 / np.square(rows).sum())
    return 1 - share, -(errors - share * about) / total * math.sqrt(groups / max(groups - 1, 1)), 0.0, effective


def _difference(parts: list[_Part], *, rows: float, confidence: float) -> Interval:
    check_confidence(confidence)
    (first, own, more, one), (second, other, most, two) = parts
    if len(own) != len(other):
        raise InputError(f"the two scores are of the same groups, got {len(own)} and {len(other)}")
    groups = len(own)
    shape = {"confidence": confidence, "groups": groups, "rows": rows}
    if math.isnan(first - second):
        return none(math.nan, "one of the two scores cannot be had", **shape)
    if groups < 2:
        return none(first - second, ONE_GROUP, **shape)
    variance = float(np.square(own - other).sum()) + more + most
    words = f"only {groups} groups: a t interval by group" if groups < FEW_GROUPS else ""
    freedom = max(min(one, two) - 1, 1.0)
    found = limits(first - second, variance, freedom=freedom, words=words, **shape)
    return replace(found, p=_p(first - second, variance, freedom))


def _p(estimate: float, variance: float, freedom: float) -> float:
    from scipy import stats

    if variance <= 0:
        return 1.0 if estimate == 0 else 0.0
    return float(2 * stats.t.sf(abs(estimate) / math.sqrt(variance), freedom))
