"""What a classifier or regression scores, from sums by group, with intervals by group.

Sums by group are all that is kept of the rows: they stream, decay and add up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import Interval, check_confidence, limits, none
from tdhook_rl.statistics.tables import TOO_FAR, class_in_one_group, hits, sums_of_squares, two_counts


def balanced_accuracy(right: Any, rows: Any, *, confidence: float = 0.95) -> Interval:
    """The mean over classes of the share of their rows that are right.

    Args:
        right: ``(groups, classes)``: how many rows of each class were classified rightly in each group.
        rows: ``(groups, classes)``: of how many.
        confidence: of the interval.

    Returns:
        the interval; a class without a row is left out, and the estimate is NaN, and why in words, for fewer than two.

    Example:
        >>> found = balanced_accuracy([[9, 1], [8, 0], [10, 2]], [[10, 2], [10, 1], [10, 2]])
        >>> round(found.estimate, 2), found.groups
        (0.75, 3)
    """
    check_confidence(confidence)
    right, rows = hits(right, rows)
    there = rows.sum(0) > 0
    right, rows = right[:, there], rows[:, there]
    held = rows.sum(1) > 0
    shape = {"confidence": confidence, "groups": int(held.sum()), "rows": float(rows.sum())}
    classes = rows.shape[1]
    if classes < 2:
        return none(math.nan, f"rows of {classes or 'no'} class only: there is nothing to tell apart", **shape)
    total = rows.sum(0)
    shares = right.sum(0) / total
    estimate = float(shares.mean())
    effective = total**2 / np.square(rows).sum(0)
    counts = (rows > 0).sum(0)
    if counts.min() < 2:
        return none(estimate, class_in_one_group(there, counts), **shape)
    residuals = (right - shares * rows) / (total - rows) * np.sqrt((counts - 1) / counts)  # as in variance_by_group
    own = np.square(residuals).sum(0)
    # A class without an error is not one that cannot err: each group counts as one row, one right and one wrong more.
    # What a decay has left of an error of long ago, less than a row, is none.
    faultless = np.minimum(right.sum(0), total - right.sum(0)) < 1
    smooth = (effective * shares + 1) / (effective + 2)
    floor = np.where(faultless, smooth * (1 - smooth) / (effective + 2), shares * (1 - shares) / total)
    own_floored = np.maximum(own, floor)
    joint = np.square(residuals.sum(1)).sum() + (own_floored - own).sum()
    freedom = own_floored.sum() ** 2 / (np.square(own_floored) / np.maximum(effective - 1, 1)).sum()
    freedom = float(max(min(freedom, shape["groups"] - 1), 1.0))
    few = int(counts.min())
    words = few_groups(few, " hold a class", bounded=True)
    return limits(
        estimate, float(joint) / classes**2, freedom=freedom, bounds=(0.0, 1.0), alike=few, at_bound=faultless.all(),
        words=words, **shape,
    )  # fmt: skip


def area_under_curve(positive: Any, negative: Any, *, confidence: float = 0.95) -> Interval:
    """The chance that a positive row scores above a negative one, ties by half, from histograms of scores by group.

    Args:
        positive: ``(groups, bins)``: of the scores of the rows with the concept.
        negative: ``(groups, bins)``: of the others.
        confidence: of the interval, by the variance of DeLong, DeLong & Clarke-Pearson 1988 by group.

    Returns:
        the interval; the estimate is NaN, and why in words, without positive or negative rows.

    Example:
        >>> area_under_curve([[0, 1, 2], [1, 1, 1]], [[2, 1, 0], [2, 0, 1]]).estimate.__round__(3)
        0.764
    """
    check_confidence(confidence)
    positive, negative = two_counts(positive, negative, "histograms", "bins")
    sizes = [side.sum(1) for side in (positive, negative)]
    rows = float(sum(size.sum() for size in sizes))
    shape = {"confidence": confidence, "groups": int(((sizes[0] + sizes[1]) > 0).sum()), "rows": rows}
    if min(size.sum() for size in sizes) <= 0:
        absent = "positive" if sizes[0].sum() <= 0 else "negative"
        return none(math.nan, f"no {absent} row: there is nothing to tell apart", **shape)
    below, above = negative.sum(0) / sizes[1].sum(), positive.sum(0) / sizes[0].sum()
    over = np.cumsum(below) - below / 2  # of negatives under a score of this bin
    under = 1 - (np.cumsum(above) - above / 2)  # of positives over it
    estimate = float(above @ over)
    counts = [int((size > 0).sum()) for size in sizes]
    few = min(counts)
    if few < 2:
        absent = "positive" if counts[0] < 2 else "negative"
        return none(estimate, f"{absent} rows are in one group only: nothing says how much groups differ", **shape)
    parts = []
    for side, size, share, count in zip((positive, negative), sizes, (over, under), counts, strict=True):
        parts.append((side @ share - estimate * size) / (size.sum() - size) * math.sqrt((count - 1) / count))
    own = np.array([float(np.square(part).sum()) for part in parts])
    effective = np.array([size.sum() ** 2 / np.square(size).sum() for size in sizes])
    variance = float(np.square(parts[0] + parts[1]).sum())
    freedom = shape["groups"] - 1.0
    if own.sum() > 0:
        freedom = min(freedom, own.sum() ** 2 / (np.square(own) / np.maximum(effective - 1, 1)).sum())
    words = few_groups(few, " hold a side", bounded=True)
    beyond = min(estimate, 1 - estimate) * min(float(size.sum()) for size in sizes)
    return limits(
        estimate, variance, freedom=max(freedom, 1.0), bounds=(0.0, 1.0), alike=few, at_bound=beyond < 0.5, words=words,
        **shape,
    )  # fmt: skip


def r_squared(sums: Any, *, confidence: float = 0.95) -> Interval:
    """The share of the variance that a prediction explains: 1 minus its squared error over that of the mean.

    Args:
        sums: ``(groups, 4)``: rows, the sum of the values, of their squares, and of the squared errors, by group. Take
            the values about some number near their mean: the squares cancel otherwise.
        confidence: of the interval.

    Returns:
        the interval; below 0 where the mean of the held-out values would have been closer.

    Example:
        >>> r_squared([[2, 0.0, 4.0, 1.0], [2, 0.0, 4.0, 1.0], [2, 0.0, 6.0, 1.0]]).estimate.__round__(3)
        0.786
    """
    check_confidence(confidence)
    sums = sums_of_squares(sums)
    sums = sums[sums[:, 0] > 0]
    rows, values, squares, errors = sums.T
    shape = {"confidence": confidence, "groups": len(sums), "rows": float(rows.sum())}
    if not len(sums):
        return none(math.nan, "no row", **shape)
    mean = values.sum() / rows.sum()
    about = squares - 2 * mean * values + mean**2 * rows
    total = about.sum()
    if total <= 1e-12 * max(squares.sum(), 1e-300):
        return none(math.nan, "the values are all the same: there is nothing to explain", **shape)
    with np.errstate(over="ignore"):
        share = float(errors.sum() / total)
    if not math.isfinite(share):
        return none(math.nan, TOO_FAR, **shape)
    if len(sums) < 2:
        return none(1 - share, ONE_GROUP, **shape)
    moves = (errors - share * about) / total * math.sqrt(len(sums) / (len(sums) - 1))
    effective = rows.sum() ** 2 / np.square(rows).sum()
    words = few_groups(len(sums))
    return below_1(1 - share, moves, freedom=max(min(effective, len(sums)) - 1, 1.0), words=words, **shape)


def below_1(
    score: float, moves: np.ndarray, *, freedom: float, confidence: float, groups: int, rows: float, words: str
) -> Interval:
    """A t interval of a score that is 1 at most, of the logarithm of what it lacks to 1.

    What is not explained is positive and skewed: its logarithm is nearer to normal.

    Args:
        score: the score.
        moves: ``(groups,)``, what each group adds to it about its mean; the sum of their squares is its variance.
        freedom: degrees of freedom of the variance.
        confidence, groups, rows, words: as of :class:`Interval`.
    """
    lacks, shape = max(1 - score, 1e-12), {"confidence": confidence, "groups": groups, "rows": rows}
    with np.errstate(over="ignore"):
        variance = float(np.square(moves / lacks).sum())
        if not math.isfinite(variance):
            return none(score, TOO_FAR, **shape)
        found = limits(math.log(lacks), variance, freedom=freedom, words=words, **shape)
        low, high = (float(1 - np.exp(bound)) for bound in (found.high, found.low))
    return replace(
        found, estimate=score, low=min(low, score), high=max(high, score), method="t by group, of the logarithm"
    )
