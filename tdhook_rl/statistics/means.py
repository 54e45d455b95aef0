"""Means and paired differences by group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import FEW_GROUPS, ONE_GROUP, few_groups, skewed_groups
from tdhook_rl.statistics.interval import (
    ROUNDING,
    Interval,
    array,
    check_bounds,
    check_confidence,
    check_resamples,
    limits,
    none,
    pair_up,
    studentised,
    studentised_ends,
    t_quantile,
    t_test,
    variance_by_group,
)

Method = Literal["auto", "t", "bootstrap"]

#: Numbers held at once while groups are drawn anew.
_BLOCK = 4_000_000


def grouped_mean(
    values: Any,
    groups: Any = None,
    *,
    confidence: float = 0.95,
    method: Method = "auto",
    bounds: tuple[float, float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over rows, with an interval by group.

    Args:
        values: ``(rows,)`` numbers.
        groups: the group of each row (episode, seed); each row its own unless given.
        confidence: of the interval.
        method: ``"t"``: how the mean moves where each group is left out, with one degree of freedom less than there are
            groups, fewer for groups of very unequal size; ``"bootstrap"``: groups are drawn anew and the mean is
            studentised by the same (Efron 1982), which follows skewed values; ``"auto"``: the bootstrap from ten groups
            on, t below, and t where ``bounds`` are given. Of lognormal values t covers .8 of the time with 3 to 9
            groups and the bootstrap .9 with 10 to 50 (``python -m benchmarks.interval_coverage``), at a nominal .95.
            The words say where groups are few, or show that they are skewed. Intervals are too narrow where a long
            tail has not shown yet, which no sample tells: of lognormal values nearly all of those hold that say so.
        bounds: the least and largest value there can be, ``(0, 1)`` for shares; the interval stays inside and does not
            collapse where all values are at a bound.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        the interval; none, and why in words, for a single group.

    Raises:
        InputError: for no rows, NaN, values outside of the bounds, or a bootstrap below ten groups.

    Example:
        >>> found = grouped_mean([1.0, 2.0, 3.0, 4.0], groups=[0, 0, 1, 1])
        >>> found.estimate, found.groups, found.method, found.words
        (2.5, 2, 't by group', 'only 2 groups: a t interval by group, too narrow if they are skewed')
    """
    check_resamples(resamples, confidence)
    check_bounds(bounds)
    rows = array(values, "values")
    if not len(rows):
        raise InputError("there are no rows to take a mean of")
    if bounds is not None and (rows.min() < bounds[0] or rows.max() > bounds[1]):
        raise InputError(f"values go from {rows.min():g} to {rows.max():g}, outside of bounds={bounds}")
    numbers = pair_up(len(rows), groups)
    counts = np.bincount(numbers).astype(np.float64)
    sums = np.bincount(numbers, rows)
    found, shape = len(counts), {"confidence": confidence, "groups": len(counts), "rows": len(rows)}
    estimate = float(rows.mean())
    if found < 2:
        return none(estimate, ONE_GROUP, **shape)
    if method == "bootstrap" and found < FEW_GROUPS:
        raise InputError(f"a bootstrap of {found} groups covers too little: from {FEW_GROUPS} groups on, or method='t'")
    variance, freedom = variance_by_group(sums, counts, estimate)
    words = few_groups(found, bounded=bounds is not None)
    if not words and bounds is None:
        words = skewed_groups(sums - estimate * counts)
    if math.sqrt(variance) <= ROUNDING * abs(estimate) and bounds is None:
        return limits(estimate, 0.0, freedom=freedom, **shape)
    if method == "t" or (method == "auto" and (found < FEW_GROUPS or bounds is not None)):
        return limits(estimate, variance, freedom=freedom, bounds=bounds, words=words, **shape)
    if method not in ("auto", "bootstrap"):
        raise InputError(f"method= is 'auto', 't' or 'bootstrap', got {method!r}")
    pulls = _pulls(sums, counts, estimate, resamples, seed)
    lower, upper, alike = studentised_ends(pulls, confidence, freedom)
    words, error = "; ".join(filter(None, (alike, words))), math.sqrt(variance)
    low, high = estimate - upper * error, estimate - lower * error
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(
        estimate=estimate, low=float(low), high=float(high), method="studentised bootstrap", words=words, **shape
    )


def paired_difference(first: Any, second: Any, groups: Any = None, **options: Any) -> Interval:
    """The mean of ``second - first`` over pairs (one state, seed or noise under two conditions), by group.

    Args:
        first, second: ``(rows,)``, a pair in each row.
        groups: the group of each pair.
        options: as of :func:`grouped_mean`.

    Raises:
        InputError: if the two do not pair up; as of :func:`grouped_mean`.

    Example:
        >>> paired_difference([1.0, 2.0, 4.0], [1.5, 2.5, 4.5]).estimate
        0.5
    """
    before, after = array(first, "values"), array(second, "values")
    if len(before) != len(after):
        raise InputError(f"pairs have one value on each side, got {len(before)} and {len(after)}")
    return grouped_mean(after - before, groups, **options)


def unpaired_difference(first: Any, second: Any, *, confidence: float = 0.95) -> Interval:
    """The mean of ``second`` minus that of ``first``, of values that do not pair up (Welch 1947).

    Args:
        first, second: ``(rows,)``, each row its own group.
        confidence: of the interval.

    Returns:
        the interval, with the p-value that there is no difference; none for a single row.

    Example:
        >>> found = unpaired_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.5, 4.0])
        >>> found.estimate, round(found.p, 2)
        (1.375, 0.15)
    """
    check_confidence(confidence)
    samples = [array(one, "values") for one in (first, second)]
    if not all(map(len, samples)):
        raise InputError("there are no rows to take a mean of")
    count = sum(map(len, samples))
    estimate = float(samples[1].mean() - samples[0].mean())
    shape = {"confidence": confidence, "groups": count, "rows": count}
    if min(map(len, samples)) < 2:
        return none(estimate, "one row only: nothing says how much rows differ", **shape)
    parts = [one.var(ddof=1) / len(one) for one in samples]
    variance, size = float(sum(parts)), max(float(np.abs(one).max()) for one in samples)
    least = 2 / math.comb(count, len(samples[0]))  # two of all ways to deal out the rows set them as far apart
    if math.sqrt(variance) <= ROUNDING * size:
        found = limits(estimate, 0.0, freedom=1, **(shape | {"groups": min(map(len, samples))}))
        words = f"p is by ranks; {found.words}"
        return replace(found, groups=count, words=words, p=t_test(estimate, 0.0, 1, least, size))
    words = few_groups(min(map(len, samples)), " on a side")
    if not words:
        words = "; ".join(dict.fromkeys(filter(None, (skewed_groups(one - one.mean()) for one in samples))))
    freedom = 1 / sum((part / variance) ** 2 / (len(one) - 1) for part, one in zip(parts, samples, strict=True))
    p = t_test(estimate, variance, freedom, least, size)
    return replace(limits(estimate, variance, freedom=freedom, words=words, **shape), p=p)


def ratio_of_means(above: Any, below: Any, groups: Any = None, *, confidence: float = 0.95) -> Interval:
    """The mean of ``above`` over that of ``below``, pair by pair, from what it is without each group (Tukey 1958).

    Args:
        above, below: ``(rows,)``, a pair in each row.
        groups: the group of each pair.
        confidence: of the interval.

    Returns:
        the interval; infinite, and none, where ``below`` is 0 on the mean; words where it is not told from 0.

    Example:
        >>> ratio_of_means([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).estimate
        2.0
    """
    top, bottom = array(above, "values"), array(below, "values")
    if len(top) != len(bottom):
        raise InputError(f"pairs have one value on each side, got {len(top)} and {len(bottom)}")
    if not len(top):
        raise InputError("there are no rows to take a mean of")
    check_confidence(confidence)
    divisor = float(bottom.mean())
    numbers = pair_up(len(top), groups)
    sums = np.bincount(numbers, bottom)
    shape = {"confidence": confidence, "groups": len(sums), "rows": len(top)}
    if divisor == 0:
        ratio = math.nan if top.mean() == 0 else math.copysign(math.inf, top.mean())
        return none(ratio, "what it is divided by is 0 on the mean", **shape)
    ratio = float(top.mean()) / divisor
    if len(sums) < 2:
        return none(ratio, ONE_GROUP, **shape)
    with np.errstate(all="ignore"):
        variance, freedom = variance_by_group(np.bincount(numbers, top), sums, ratio)
    if not math.isfinite(variance):
        return none(ratio, "what it is divided by is 0 without one of the groups", **shape)
    words = [few_groups(len(sums)) or skewed_groups(np.bincount(numbers, top - ratio * bottom))]
    if 0.0 in grouped_mean(bottom, groups, confidence=confidence, method="t"):
        words.append("what it is divided by is not told from 0")
    return limits(ratio, variance, freedom=freedom, words="; ".join(filter(None, words)), **shape)


def p_value(values: Any, groups: Any = None, *, null: float = 0.0) -> float:
    """Of a two-sided t test by group that the mean is ``null``; NaN for a single group.

    Groups that are all alike have no spread to go by: of n of them it is that of a sign test, ``2 ** (1 - n)``.

    Args:
        values: ``(rows,)``; differences of pairs, for a paired test.
        groups: the group of each row.
        null: the mean under test.

    Example:
        >>> round(p_value([0.1, 0.3, 0.2, 0.25]), 3)
        0.016
    """
    rows = array(values, "values")
    if not len(rows):
        raise InputError("there are no rows to test the mean of")
    if not math.isfinite(null):
        raise InputError(f"null= is a number, got {null!r}")
    numbers = pair_up(len(rows), groups)
    counts = np.bincount(numbers).astype(np.float64)
    if len(counts) < 2:
        return math.nan
    estimate = float(rows.mean())
    variance, freedom = variance_by_group(np.bincount(numbers, rows), counts, estimate)
    return t_test(estimate - null, variance, freedom, 2.0 ** (1 - len(counts)), size=max(abs(estimate), abs(null)))


def may_be_0(sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95) -> np.ndarray:
    """Which means over rows are not told from 0 by a t test by group, ``(means,)``; none of a single group.

    Args:
        sums: ``(means, groups)``, of the values of each group.
        counts: ``(groups,)``, how many rows each has.
        confidence: 1 minus the level of the test.
    """
    found = np.zeros(len(sums), dtype=bool)
    for place, own in enumerate(sums if len(counts) > 1 else ()):
        mean = own.sum() / counts.sum()
        variance, freedom = variance_by_group(own, counts, mean)
        found[place] = abs(mean) <= t_quantile(confidence, freedom) * math.sqrt(variance)
    return found


def _pulls(sums: np.ndarray, counts: np.ndarray, mean: float, resamples: int, seed: int) -> np.ndarray:
    """``(mean of a resample - mean) / its standard error`` for each resample of the groups."""
    draws = np.random.default_rng(seed)
    groups, found = len(counts), []
    for start in range(0, resamples, block := max(_BLOCK // groups, 1)):
        picked = draws.integers(groups, size=(min(block, resamples - start), groups))
        of_sums, of_counts = sums[picked], counts[picked]
        total = of_counts.sum(1)
        means = of_sums.sum(1) / total
        moves = (of_sums - means[:, None] * of_counts) / (total[:, None] - of_counts)  # as in variance_by_group
        errors = np.sqrt(np.square(moves).sum(1) * (groups - 1) / groups)
        pulls = studentised(means - mean, errors, 1e-9 * abs(mean))
        found.append(pulls)
    return np.concatenate(found)
