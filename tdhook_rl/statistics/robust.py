"""The interquartile mean, and the bootstrap of any other statistic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import FEW_GROUPS, ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import (
    ROUNDING,
    Interval,
    array,
    check_resamples,
    limits,
    none,
    pair_up,
    studentised,
    studentised_ends,
)

#: From so many groups on resamples are looked at some at a time, and so is what is left without each group, which is
#: as many times all of them: so many numbers at once.
_MANY, _BLOCK = 2000, 4_000_000


def iqm(
    values: Any,
    groups: Any = None,
    *,
    strata: Any = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interquartile mean of the groups' means: of their middle half.

    Groups are drawn anew within their stratum, and the mean is studentised by its winsorised variance (Tukey &
    McLaughlin 1963); below ten groups that variance gives a t interval.

    Args:
        values: ``(rows,)``, such as a return for each episode.
        groups: the group of each row, such as the seed of the training run; each row its own unless given.
        strata: the stratum of each row, such as the task; a group belongs to one stratum, groups of the same number in
            two strata are two.
        confidence: of the interval.
        resamples, seed: of the bootstrap.

    Raises:
        InputError: for no rows or NaN.

    Reference: Agarwal, Schwarzer, Castro, Courville & Bellemare 2021, NeurIPS.

    Example:
        >>> iqm([0.0, 1.0, 2.0, 100.0]).estimate
        1.5
    """
    check_resamples(resamples, confidence)
    rows = array(values, "values")
    if not len(rows):
        raise InputError("there are no rows to take a mean of")
    layers = np.zeros(len(rows), dtype=np.int64) if strata is None else pair_up(len(rows), strata)
    numbers = np.unique(np.stack([layers, pair_up(len(rows), groups)]), axis=1, return_inverse=True)[1].reshape(-1)
    means = np.bincount(numbers, rows) / np.bincount(numbers)
    layer = np.zeros(len(means), dtype=np.int64)
    layer[numbers] = layers
    of_layers = [np.flatnonzero(layer == one) for one in range(layers.max() + 1)]
    middle, variance = _middle(means[None], layer)
    estimate, count = float(middle[0]), len(means)
    shape = {"confidence": confidence, "groups": count, "rows": len(rows)}
    if min(map(len, of_layers)) < 2:
        return none(estimate, "one group only (in a stratum): nothing says how much groups differ", **shape)
    if variance[0] <= (1e-12 * estimate) ** 2:
        words = "the middle half of the groups is alike, which says little about their spread"
        return none(estimate, words, **shape) if count < FEW_GROUPS else limits(
            estimate, 0.0, freedom=1, words=words, **shape
        )  # fmt: skip
    freedom = max(count - 2 * (count // 4) - len(of_layers), 1)
    if count < FEW_GROUPS:
        return limits(estimate, float(variance[0]), freedom=freedom, words=few_groups(count), **shape)
    draws = np.random.default_rng(seed)
    picked = np.empty((resamples, count), dtype=np.int64)
    for members in of_layers:
        picked[:, members] = members[draws.integers(len(members), size=(resamples, len(members)))]
    again, spread = _middle(means[picked], layer)
    pulls = studentised(again - estimate, np.sqrt(spread), 1e-9 * abs(estimate))
    lower, upper, words = studentised_ends(pulls, confidence, freedom)
    error = math.sqrt(variance[0])
    return Interval(
        estimate=estimate, low=float(estimate - upper * error), high=float(estimate - lower * error),
        method="studentised bootstrap", words=words, **shape,
    )  # fmt: skip


def bootstrap(
    statistic: Callable[..., Any],
    values: Any,
    groups: Any = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Any statistic of the groups' means, with a bias-corrected and accelerated interval (Efron 1987), by scipy.

    Args:
        statistic: ``statistic(values, axis=-1)``, such as ``numpy.median``.
        values: ``(rows,)``.
        groups: the group of each row; each row its own unless given.
        confidence: of the interval.
        resamples, seed: of the bootstrap.

    Returns:
        the interval; none, and why in words, below ten groups or where all are alike.

    Example:
        >>> import numpy as np
        >>> found = bootstrap(np.median, np.arange(25.0))
        >>> found.estimate, found.low < 12 < found.high
        (12.0, True)
    """
    from scipy import stats

    check_resamples(resamples, confidence)
    rows = array(values, "values")
    if not len(rows):
        raise InputError("there are no rows to bootstrap")
    numbers = pair_up(len(rows), groups)
    means = np.bincount(numbers, rows) / np.bincount(numbers)
    estimate = float(statistic(means, axis=-1))
    shape = {"confidence": confidence, "groups": len(means), "rows": len(rows)}
    if len(means) == 1:
        return none(estimate, ONE_GROUP, **shape)
    if len(means) < FEW_GROUPS:
        return none(estimate, f"only {len(means)} groups: a bootstrap covers too little below {FEW_GROUPS}", **shape)
    if np.ptp(means) <= ROUNDING * np.abs(means).max():
        return none(estimate, f"all {len(means)} groups are alike", **shape)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # which is said below
        found = stats.bootstrap(
            (means,), statistic, confidence_level=confidence, n_resamples=resamples, method="BCa",
            rng=np.random.default_rng(seed), batch=None if len(means) <= _MANY else max(_BLOCK // len(means), 1),
        ).confidence_interval  # fmt: skip
    if not found.high - found.low > ROUNDING * abs(estimate):  # NaN as well
        return none(estimate, "the statistic does not move when groups are left out", **shape)
    return Interval(estimate=estimate, low=float(found.low), high=float(found.high), method="BCa bootstrap", **shape)


def _middle(samples: np.ndarray, layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the middle half of each row of samples, and its winsorised variance within strata."""
    count = samples.shape[1]
    cut = count // 4
    ordered = np.sort(samples, axis=1)
    middle = ordered[:, cut : count - cut].mean(1)
    drawn_in = np.clip(samples, ordered[:, cut, None], ordered[:, count - cut - 1, None])
    squares = np.zeros(len(samples))
    for one in range(layer.max() + 1):
        part = drawn_in[:, layer == one]
        size = part.shape[1]
        squares += np.square(part - part.mean(1, keepdims=True)).sum(1) * size / max(size - 1, 1)
    return middle, squares / (count - 2 * cut) ** 2
