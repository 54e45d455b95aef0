"""Differences and means of scores of the same groups: trained and untrained, true labels and shuffled ones.

What the groups have in common cancels, so that the interval of the difference is narrower than those of the scores let
one think, and may be wider where they disagree.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import Interval, check_confidence, limits, none, t_test
from tdhook_rl.statistics.scores import below_1
from tdhook_rl.statistics.tables import TOO_FAR, class_in_one_group, hits, sums_of_squares


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
    first, second = hits(right, rows), hits(other_right, other_rows)
    return _difference(
        _accuracy(*first), _accuracy(*second), rows=float(first[1].sum()), confidence=confidence, bounds=(-1.0, 1.0)
    )


def r_squared_difference(sums: Any, other_sums: Any, *, confidence: float = 0.95) -> Interval:
    """The share of variance that one prediction explains minus that of another, by group.

    Args:
        sums, other_sums: ``(groups, 4)``, as of :func:`r_squared`, the same groups in the same order.
        confidence: of the interval.

    Example:
        >>> r_squared_difference([[2, 0.0, 4.0, 1.0]] * 3, [[2, 0.0, 4.0, 3.0]] * 3).estimate
        0.5
    """
    first, second = (sums_of_squares(one) for one in (sums, other_sums))
    return _difference(_explained(first), _explained(second), rows=float(first[:, 0].sum()), confidence=confidence)


def mean_r_squared(sums: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean over several numbers of the share of variance that is explained, by group.

    Args:
        sums: ``(groups, numbers, 4)``, as of :func:`r_squared`.
        confidence: of the interval.
    """
    check_confidence(confidence)
    parts = [_explained(sums_of_squares(one)) for one in sums.swapaxes(0, 1)]
    groups, estimate = len(sums), sum(part.score for part in parts) / len(parts)
    shape = {"confidence": confidence, "groups": groups, "rows": float(sums[:, 0, 0].sum())}
    lacking = [place for place, part in enumerate(parts) if math.isnan(part.score)]
    if lacking:
        return none(math.nan, f"number {lacking[0]} cannot be scored", **shape)
    words = next((part.words for part in parts if part.words), "")
    if words:
        return none(estimate, words, **shape)
    moves = np.sum([part.own for part in parts], axis=0) / len(parts)
    freedom = max(min(part.effective for part in parts) - 1, 1.0)
    return below_1(estimate, moves, freedom=freedom, words=few_groups(groups), **shape)


class _Part(NamedTuple):
    """A score, and what its variance is made of."""

    score: float
    own: np.ndarray  # (groups,), what each group adds to it about its mean
    unseen: float  # variance that the groups do not show
    effective: float  # as how many groups of one size they count
    words: str = ""  # why there is no interval


def _accuracy(right: np.ndarray, rows: np.ndarray) -> _Part:
    there = rows.sum(0) > 0
    groups = len(rows)
    if there.sum() < 2:
        return _Part(math.nan, np.zeros(groups), 0.0, 0.0)
    right, rows = right[:, there], rows[:, there]
    total, counts = rows.sum(0), (rows > 0).sum(0)
    shares = right.sum(0) / total
    score = float(shares.mean())
    if counts.min() < 2:
        return _Part(score, np.zeros(groups), 0.0, 0.0, class_in_one_group(there, counts))
    # Its variance, and that of a class without an error, are as of balanced_accuracy.
    residuals = (right - shares * rows) / (total - rows) * np.sqrt((counts - 1) / counts)
    effective = total**2 / np.square(rows).sum(0)
    smooth = (effective * shares + 1) / (effective + 2)
    faultless = np.minimum(right.sum(0), total - right.sum(0)) < 1
    floor = np.where(faultless, smooth * (1 - smooth) / (effective + 2), 0.0)
    unseen = np.maximum(floor - np.square(residuals).sum(0), 0).sum()
    return _Part(score, residuals.mean(1), float(unseen) / len(shares) ** 2, float(effective.min()))


def _explained(sums: np.ndarray) -> _Part:
    rows, values, squares, errors = sums.T
    groups = int((rows > 0).sum())
    if not groups:
        return _Part(math.nan, np.zeros(len(sums)), 0.0, 0.0)
    mean = values.sum() / rows.sum()
    about = squares - 2 * mean * values + mean**2 * rows
    total = about.sum()
    if total <= 1e-12 * max(squares.sum(), 1e-300):
        return _Part(math.nan, np.zeros(len(sums)), 0.0, 0.0)
    with np.errstate(over="ignore"):
        share = float(errors.sum() / total)
    if not math.isfinite(share):
        return _Part(math.nan, np.zeros(len(sums)), 0.0, 0.0)
    if groups < 2:
        return _Part(1 - share, np.zeros(len(sums)), 0.0, 0.0, ONE_GROUP)
    effective = float(rows.sum() ** 2 / np.square(rows).sum())
    moves = -(errors - share * about) / total / (1 - rows / rows.sum()) * math.sqrt((groups - 1) / groups)
    return _Part(1 - share, moves, 0.0, effective)


def _difference(
    first: _Part, second: _Part, *, rows: float, confidence: float, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    check_confidence(confidence)
    if len(first.own) != len(second.own):
        raise InputError(f"the two scores are of the same groups, got {len(first.own)} and {len(second.own)}")
    groups, estimate = len(first.own), first.score - second.score
    shape = {"confidence": confidence, "groups": groups, "rows": rows}
    if math.isnan(estimate):
        return none(math.nan, "one of the two scores cannot be had", **shape)
    if groups < 2:
        return none(estimate, ONE_GROUP, **shape)
    if first.words or second.words:
        return none(estimate, first.words or second.words, **shape)
    with np.errstate(over="ignore"):
        variance = float(np.square(first.own - second.own).sum()) + first.unseen + second.unseen
    if not math.isfinite(variance):
        return none(estimate, TOO_FAR, **shape)
    freedom = max(min(first.effective, second.effective) - 1, 1.0)
    found = limits(estimate, variance, freedom=freedom, words=few_groups(groups), **shape)
    p = t_test(estimate, variance, freedom, least=2.0 ** (1 - groups))
    return replace(found, p=p, low=max(found.low, bounds[0]), high=min(found.high, bounds[1]))
