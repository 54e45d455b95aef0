"""Many claims at once, what could have been found at all, and how likely one condition is better than another."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import few_groups
from tdhook_rl.statistics.interval import (
    Interval,
    array,
    check_confidence,
    limits,
    none,
    pair_up,
    real_numbers,
    variance_by_group,
)
from tdhook_rl.statistics.means import grouped_mean


def holm(p_values: Any) -> np.ndarray:
    """P-values adjusted so that the chance of any false claim is held (Holm 1979).

    Args:
        p_values: of any shape; NaN, a test that could not be made, stays NaN and is not counted.

    Returns:
        the adjusted values, in the shape given: claim what is at most the level.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    given, made = _checked(p_values)
    tested = given[made]
    order = np.argsort(tested)
    steps = np.maximum.accumulate(tested[order] * np.arange(len(tested), 0, -1))
    adjusted = np.empty_like(tested)
    adjusted[order] = np.minimum(steps, 1.0)
    found = given.copy()
    found[made] = adjusted
    return found


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """P-values adjusted so that the share of false claims among all claims is held (Benjamini & Hochberg 1995).

    Args:
        p_values: of any shape; NaN stays NaN and is not counted.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]
    """
    from scipy import stats

    given, made = _checked(p_values)
    found = given.copy()
    if made.any():
        found[made] = stats.false_discovery_control(given[made], method="bh")
    return found


def minimum_detectable_effect(
    spread: float, groups: int, *, power: float = 0.8, confidence: float = 0.95, samples: int = 1
) -> float:
    """The smallest true effect that a two-sided t test by group finds with this power.

    Args:
        spread: the standard deviation between groups (of the differences, for pairs).
        groups: how many there are (of each sample).
        power: how often the effect is to be found.
        confidence: 1 minus the level of the test.
        samples: 1 for a mean or paired differences, 2 for two independent samples.

    Returns:
        the effect, in the units of ``spread``; infinite for a single group.

    Example:
        >>> round(minimum_detectable_effect(1.0, 10), 3)
        0.996
    """
    from scipy import optimize, stats

    whole = isinstance(groups, Integral) and groups >= 1
    if spread < 0 or not math.isfinite(spread) or not whole or samples not in (1, 2):
        raise InputError(
            "spread is not negative, groups a whole number from 1 on, samples 1 or 2: "
            f"got {spread}, {groups}, {samples}"
        )
    if not (0 < power < 1 and 0 < confidence < 1 and power > 1 - confidence):
        raise InputError(f"power and confidence are shares, power above 1 - confidence; got {power} and {confidence}")
    freedom = samples * (groups - 1)
    if freedom < 1:
        return math.inf
    cut = stats.t.ppf(0.5 + confidence / 2, freedom)

    def lacks(shift: float) -> float:
        return float(stats.nct.sf(cut, freedom, shift) + stats.nct.cdf(-cut, freedom, shift)) - power

    top = cut + 4.0
    while lacks(top) < 0:
        top *= 2
    return float(optimize.brentq(lacks, 0.0, top)) * spread * math.sqrt(samples / groups)


def _checked(p_values: Any) -> tuple[np.ndarray, np.ndarray]:
    given = np.array(real_numbers(p_values, "p-values"))
    made = ~np.isnan(given)
    if ((given[made] < 0) | (given[made] > 1)).any():
        raise InputError(f"p-values lie between 0 and 1, got {given[made].min():g} to {given[made].max():g}")
    return given, made


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
    before, after = (array(one, "values", largest=np.inf) for one in (first, second))  # compared, never squared
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
        sizes = np.bincount(numbers).astype(np.float64)
        counts.append(len(sizes))
        if len(sizes) > 1:
            variance, freedom = variance_by_group(np.bincount(numbers, shares), sizes, estimate)
            parts.append(variance)
            freedoms.append(freedom)
    shape = {"confidence": confidence, "groups": sum(counts), "rows": len(before) + len(after)}
    fewest = min(counts)
    if fewest < 2:
        return none(estimate, "one group only on a side: nothing says how much groups differ", **shape)
    total = sum(parts)
    freedom = (
        total**2 / sum(part**2 / free for part, free in zip(parts, freedoms, strict=True)) if total else fewest - 1
    )
    words = few_groups(fewest, " on a side", bounded=True)
    # A separation without exception says no more than the smaller side.
    return limits(estimate, total, freedom=freedom, bounds=(0.0, 1.0), alike=fewest, words=words, **shape)


def _shares(of: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each value of ``at``, the share of ``of`` below it, ties by half."""
    ordered = np.sort(of)
    return (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(of))
