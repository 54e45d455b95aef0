"""What every interval is, whatever is given: about its estimate, wider the surer, in words where it says nothing."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tdhook_rl import statistics
from tdhook_rl.statistics import Interval, jackknife
from tdhook_rl.statistics.differences import mean_r_squared

Draws = np.random.Generator

#: By name values that a figure may be given.
VALUES: dict[str, Callable[[Draws, int], np.ndarray]] = {
    "normal": lambda draws, count: draws.normal(size=count),
    "zeros": lambda draws, count: np.zeros(count),
    "alike, without a last digit": lambda draws, count: np.full(count, 0.1),
    "hits": lambda draws, count: draws.integers(0, 2, count).astype(float),
    "one hit": lambda draws, count: np.r_[np.zeros(count - 1), 1.0],
    "skewed": lambda draws, count: np.exp(5 * draws.normal(size=count)),
    "far from 0": lambda draws, count: 1e8 + draws.normal(size=count),
    "huge": lambda draws, count: 1e90 * draws.normal(size=count),
    "tiny": lambda draws, count: 1e-90 * draws.normal(size=count),
}


def groups_of(draws: Draws, count: int) -> Any:
    """None, a few, many, one, and one that holds most."""
    most = np.r_[np.zeros(count - count // 4, dtype=int), 1 + np.arange(count // 4)]
    several = [np.arange(count) // max(1, count // int(draws.integers(1, 13))), draws.integers(0, count, count)]
    return [None, *several, np.zeros(count, dtype=int), most][draws.integers(5)]


def sums_of(draws: Draws, counts: np.ndarray, value: str, error: str) -> np.ndarray:
    values, errors = ([VALUES[one](draws, int(count)) for count in counts] for one in (value, error))
    sums = [
        [one.sum(), np.square(one).sum(), np.square(wrong).sum()] for one, wrong in zip(values, errors, strict=True)
    ]
    return np.concatenate([counts[:, None], sums], 1)


def figures(draws: Draws, value: str, other: str, scale: float = 1.0) -> dict[str, Callable[[float], Interval]]:
    """By name what is found of some values and others, of a confidence."""
    count, groups = int(draws.integers(1, 40)), int(draws.integers(1, 14))
    one, two = (scale * VALUES[name](draws, count) for name in (value, other))
    by, share = groups_of(draws, count), np.clip(np.abs(one), 0, 1)
    rows, others = (
        draws.integers(0, 4, (groups, 3)) * draws.integers(0, 2, (groups, 1)),
        draws.integers(0, 3, (groups, 3)),
    )
    right = [np.floor(rows * draws.random((groups, 3))), rows * draws.integers(0, 2)]
    counts = draws.integers(1, 6, groups)
    sums = [sums_of(draws, counts, value, other) for _ in range(2)]
    draw = {"resamples": 200}
    return {
        "mean": lambda sure: statistics.grouped_mean(one, by, confidence=sure, **draw),
        "mean, t": lambda sure: statistics.grouped_mean(one, by, confidence=sure, method="t"),
        "share": lambda sure: statistics.grouped_mean(share, by, confidence=sure, bounds=(0, 1)),
        "pairs": lambda sure: statistics.paired_difference(one, two, by, confidence=sure, **draw),
        "samples": lambda sure: statistics.unpaired_difference(one, two, confidence=sure),
        "ratio": lambda sure: statistics.ratio_of_means(one, np.abs(two) / scale, by, confidence=sure),
        "improvement": lambda sure: statistics.probability_of_improvement(
            one, two, groups_first=by, groups_second=by, confidence=sure
        ),
        "improvement in pairs": lambda sure: statistics.probability_of_improvement(
            one, two, groups_first=by, paired=True, confidence=sure
        ),
        "iqm": lambda sure: statistics.iqm(one, by, confidence=sure, **draw),
        "iqm of strata": lambda sure: statistics.iqm(one, by, strata=np.arange(count) % 2, confidence=sure, **draw),
        "balanced accuracy": lambda sure: statistics.balanced_accuracy(right[0], rows, confidence=sure),
        "difference": lambda sure: statistics.accuracy_difference(right[0], rows, right[1], rows, confidence=sure),
        "area": lambda sure: statistics.area_under_curve(rows, others, confidence=sure),
        "explained": lambda sure: statistics.r_squared(sums[0], confidence=sure),
        "difference of explained": lambda sure: statistics.r_squared_difference(*sums, confidence=sure),
        "mean explained": lambda sure: mean_r_squared(np.stack(sums, 1), confidence=sure),
        "jackknife": lambda sure: jackknife(float(one.mean()), two, rows=count, confidence=sure),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("other", VALUES)
@pytest.mark.parametrize("value", VALUES)
def test_an_interval_is_about_its_estimate_and_says_where_it_is_nothing(value: str, other: str) -> None:
    draws = np.random.default_rng([*map(ord, value + other)])
    for _ in range(3):
        for name, figure in figures(draws, value, other).items():
            found, surer = figure(0.95), figure(0.99)
            if not found.known:
                assert found.words, name
                continue
            slack = 1e-9 * max(abs(found.estimate), abs(found.low) if math.isfinite(found.low) else 0.0)
            assert found.low - slack <= found.estimate <= found.high + slack, name
            assert surer.low - slack <= found.low <= found.high <= surer.high + slack, name
            assert found.high > found.low or found.words, name


@pytest.mark.parametrize(
    "figure", ["mean", "mean, t", "pairs", "samples", "ratio", "iqm", "iqm of strata", "jackknife"]
)
@pytest.mark.parametrize("value", ["normal", "hits", "skewed", "one hit", "alike, without a last digit"])
def test_another_unit_of_measure_changes_nothing_but_the_numbers(value: str, figure: str) -> None:
    plain = figures(np.random.default_rng(3), value, "normal")[figure](0.95)
    for scale in (3.0, 1e-6, 1e50):
        found = figures(np.random.default_rng(3), value, "normal", scale)[figure](0.95)
        assert (found.known, found.words) == (plain.known, plain.words)
        limits = np.array([plain.low, plain.estimate, plain.high])
        assert [found.low, found.estimate, found.high] == pytest.approx(scale * limits, rel=1e-6, nan_ok=True)


def test_of_many_groups_a_bootstrap_is_the_same_in_little_memory() -> None:
    """What is left without each group is as many times all of them: of 8,000, half a gigabyte."""
    values = np.random.default_rng(0).exponential(size=8000)
    options = {"confidence_level": 0.95, "n_resamples": 200, "method": "BCa", "rng": np.random.default_rng(0)}
    by_scipy = stats.bootstrap((values[:2500],), np.median, **options).confidence_interval
    found = statistics.bootstrap(np.median, values[:2500], resamples=200)
    assert (found.low, found.high) == pytest.approx((by_scipy.low, by_scipy.high), rel=1e-12)
    tracemalloc.start()
    assert statistics.bootstrap(np.median, values, resamples=200).known
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
