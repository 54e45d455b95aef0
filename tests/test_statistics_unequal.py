"""Intervals of groups that are unlike: one that holds most of the rows, few ones, alike ones, skewed ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tdhook_rl import statistics
from tdhook_rl.statistics import Interval, jackknife
from tdhook_rl.statistics.differences import mean_r_squared
from tdhook_rl.sweeps.causal.gap import Gap, pooled_shares

#: Of groups of these sizes, one of which holds most of the rows.
UNEQUAL = {5: [80, 5, 5, 5, 5], 12: [200, *[5] * 11], 30: [500, *[5] * 29]}


def moved(found: Interval, by: float) -> Interval:
    return replace(found, low=found.low - by, high=found.high - by)


def by_class(values: np.ndarray, groups: np.ndarray, *, scored: str) -> Interval:
    """Of groups of one class each, the even ones of the first: right where the value is above 0."""
    count, labels = groups.max() + 1, groups % 2
    rows, right = (np.stack([np.bincount(groups, of & (labels == side), count) for side in (0, 1)], 1)
                   for of in (np.ones(len(values), dtype=bool), values > 0))  # fmt: skip
    if scored == "accuracy":
        return moved(statistics.balanced_accuracy(right, rows), 0.5)
    if scored == "difference":
        return statistics.accuracy_difference(right, rows, rows / 2, rows)
    bins = np.digitize(values, np.linspace(-3, 3, 99))
    tables = np.zeros((2, count, 100))
    np.add.at(tables, (labels, groups, bins), 1.0)
    return moved(statistics.area_under_curve(tables[1], tables[0]), 0.5)


def shared(values: np.ndarray, groups: np.ndarray, *, by: str) -> Interval:
    """Of groups of one row each, whose weight is their number of rows: what part of the weight a value near .5 is."""
    weights = np.bincount(groups).astype(float)
    parts = weights * (0.5 + 0.2 * np.bincount(groups, values) / weights)
    if by == "ratio":
        return moved(statistics.ratio_of_means(parts, weights), 0.5)
    gap = Gap(base=torch.zeros(len(weights)).double(), source=torch.from_numpy(weights))
    (found,) = pooled_shares(torch.from_numpy(parts)[None], gap, None)
    assert found is not None
    return moved(found, 0.5)


#: By figure: an interval from the values of groups, whose truth is 0.
OF_UNEQUAL: dict[str, Callable[..., Interval]] = {
    "t": lambda values, groups: statistics.grouped_mean(values, groups, method="t"),
    "auto": lambda values, groups: statistics.grouped_mean(values, groups, resamples=200),
    "within bounds": lambda values, groups: statistics.grouped_mean(np.tanh(values), groups, bounds=(-1, 1)),
    "pairs": lambda values, groups: statistics.paired_difference(np.ones(len(values)), 1 + values, groups),
    "ratio": lambda values, groups: statistics.ratio_of_means(values, np.ones(len(values)), groups),
    "ratio of weights": lambda values, groups: shared(values, groups, by="ratio"),
    "share of a difference": lambda values, groups: shared(values, groups, by="gap"),
    "improvement": lambda values, groups: moved(
        statistics.probability_of_improvement(np.linspace(-2, 2, 40), values, groups_second=groups), 0.5
    ),
    "improvement on it": lambda values, groups: moved(
        statistics.probability_of_improvement(values, np.linspace(-2, 2, 40), groups_first=groups), 0.5
    ),
    "improvement in pairs": lambda values, groups: moved(
        statistics.probability_of_improvement(np.zeros(len(values)), values, groups_first=groups, paired=True), 0.5
    ),
    "balanced accuracy": lambda values, groups: by_class(values, groups, scored="accuracy"),
    "area": lambda values, groups: by_class(values, groups, scored="area"),
    "difference of accuracies": lambda values, groups: by_class(values, groups, scored="difference"),
}


@pytest.mark.parametrize("groups", UNEQUAL)
@pytest.mark.parametrize("figure", OF_UNEQUAL)
def test_a_group_that_holds_most_rows_is_not_taken_for_all_groups(figure: str, groups: int) -> None:
    draws, numbers = np.random.default_rng(0), np.repeat(np.arange(groups), UNEQUAL[groups])
    held = []
    for _ in range(100):
        values = draws.normal(size=groups)[numbers] + 0.3 * draws.normal(size=len(numbers))
        held.append(0.0 in OF_UNEQUAL[figure](values, numbers))
    assert np.mean(held) >= 0.86  # three standard errors below .95


def test_a_t_interval_is_that_of_leaving_groups_out() -> None:
    draws = np.random.default_rng(0)
    numbers = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 30])
    values = draws.normal(size=6)[numbers] + draws.normal(size=len(numbers))
    without = np.array([values[numbers != one].mean() for one in range(6)])
    variance = 5 / 6 * np.square(without - values.mean()).sum()
    freedom = 45**2 / (1 + 4 + 9 + 16 + 25 + 900) - 1
    found = statistics.grouped_mean(values, numbers, method="t")
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
    assert statistics.p_value(values, numbers) == pytest.approx(
        2 * stats.t.sf(abs(values.mean()) / math.sqrt(variance), freedom)
    )


@pytest.mark.parametrize("signed", [False, True])
def test_a_ratio_is_that_without_each_group(signed: bool) -> None:
    draws, numbers = np.random.default_rng(0), np.arange(40) % 12
    below = draws.exponential(size=40) - (0.4 if signed else 0.0)
    above = 2 * below + draws.normal(size=40)
    without = np.array([above[numbers != one].sum() / below[numbers != one].sum() for one in range(12)])
    found = statistics.ratio_of_means(above, below, numbers)
    sizes = np.bincount(numbers, below)
    reach = stats.t.ppf(0.975, max(min(12, sizes.sum() ** 2 / np.square(sizes).sum()) - 1, 1))
    whole = above.sum() / below.sum()
    assert found.estimate == pytest.approx(whole)
    assert found.half_width == pytest.approx(reach * math.sqrt(11 / 12 * np.square(without - whole).sum()))


@pytest.mark.parametrize("groups", [4, 12, 40])
def test_a_mean_of_explained_shares_is_of_numbers_that_groups_have_in_common(groups: int) -> None:
    draws, held = np.random.default_rng(0), []
    for _ in range(150):
        values, common = draws.normal(size=(groups, 3, 20)), draws.normal(size=(groups, 1, 1))
        errors = 0.6 * (0.7 * common + 0.7 * draws.normal(size=values.shape))
        rows = np.full((groups, 3), 20.0)
        sums = np.stack([rows, values.sum(2), (values**2).sum(2), (errors**2).sum(2)], 2)
        found = mean_r_squared(sums)
        held.append(1 - 0.36 * 0.98 in found)
        each = [statistics.r_squared(sums[:, one]) for one in range(3)]
        assert found.estimate == pytest.approx(np.mean([one.estimate for one in each]))
    assert np.mean(held) >= 0.86
    alone, same = mean_r_squared(sums[:, :1]), mean_r_squared(sums[:, [0, 0]])
    assert (alone.low, alone.high) == pytest.approx((each[0].low, each[0].high))
    assert (same.low, same.high) == pytest.approx((each[0].low, each[0].high))
    sums[:, 1, 1:3] = 0.0
    assert "number 1 cannot be scored" in mean_r_squared(sums).words


# ------------------------------------------------------------------ what is said in words

VALUES = np.random.default_rng(0).normal(size=12) + 3
SUMS = np.stack([np.ones(12), VALUES, VALUES**2, np.abs(VALUES)], 1)
#: By figure: of the first groups of twelve.
OF_FEW: dict[str, Callable[[int], Interval]] = {
    "mean": lambda count: statistics.grouped_mean(VALUES[:count]),
    "pairs": lambda count: statistics.paired_difference(np.zeros(count), VALUES[:count]),
    "samples": lambda count: statistics.unpaired_difference(VALUES, VALUES[:count] + 1),
    "ratio": lambda count: statistics.ratio_of_means(VALUES[:count] ** 2, VALUES[:count]),
    "iqm": lambda count: statistics.iqm(VALUES[:count]),
    "jackknife": lambda count: jackknife(3.0, VALUES[:count], rows=12),
    "explained": lambda count: statistics.r_squared(SUMS[:count]),
    "difference of explained": lambda count: statistics.r_squared_difference(SUMS[:count], SUMS[:count] * 1.5),
    "difference of accuracies": lambda count: statistics.accuracy_difference(
        np.arange(24).reshape(12, 2)[:count] % 5, *[np.full((count, 2), one) for one in (5, 2, 5)]
    ),
}


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("figure", OF_FEW)
def test_few_groups_say_that_their_interval_may_be_too_narrow(figure: str, count: int) -> None:
    found = OF_FEW[figure](count)
    assert found.known
    assert f"only {count} groups" in found.words
    assert "too narrow if they are skewed" in found.words
    assert "only" not in OF_FEW[figure](12).words


#: By name: a draw of groups, and their mean.
SKEWED: dict[str, tuple[Callable[..., Any], float]] = {
    "lognormal": (lambda draws, count: np.exp(draws.normal(size=count)), math.exp(0.5)),
    "heavy": (lambda draws, count: np.exp(1.5 * draws.normal(size=count)), math.exp(1.125)),
    "rare": (lambda draws, count: (draws.random(count) < 0.1).astype(float), 0.1),
}


@pytest.mark.parametrize("count", [3, 8, 20, 50])
@pytest.mark.parametrize("drawn", SKEWED)
def test_intervals_that_cover_too_little_say_so(drawn: str, count: int) -> None:
    draw, true = SKEWED[drawn]
    draws = np.random.default_rng(0)
    found = [statistics.grouped_mean(draw(draws, count), resamples=300) for _ in range(150)]
    silent = [one for one in found if not one.words]
    if count < statistics.FEW_GROUPS:
        assert np.mean([true in one for one in found]) < 0.9
        assert not silent
    else:
        spread = [one for one in found if one.high > one.low]
        assert np.mean([true in one for one in spread]) >= 0.84
        assert all("alike" in one.words for one in found if one.high == one.low)
        assert len(silent) < 0.9 * len(found)


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize("value", [1.0, 0.1, -1e9, 1e-9])
def test_groups_that_are_alike_do_not_tell_that_others_are(value: float, count: int) -> None:
    """Numbers that have no last digit in binary are alike too, and p is that of a test by signs."""
    alike = np.full(count, value)
    others = 1 - 0.05 ** (1 / count)
    assert statistics.p_value(alike) == 2.0 ** (1 - count)
    assert statistics.p_value(alike, null=value) == 1.0
    found = statistics.grouped_mean(alike)
    assert f"all {count} groups are alike, though up to {others:.0%} of others may not be" in found.words
    ranks = stats.mannwhitneyu(np.arange(count), count + np.arange(count), method="exact")
    assert statistics.unpaired_difference(np.zeros(count), alike).p == pytest.approx(ranks.pvalue)
    assert statistics.unpaired_difference(alike, alike).p == 1.0


def test_resamples_without_spread_are_no_evidence() -> None:
    """Of 20 rare hits one was seen: resamples without it have no spread, and were taken for what the mean is."""
    hits = np.eye(20)[0]
    found = statistics.grouped_mean(hits)
    assert "alike too often" in found.words
    assert found.low < 0 < 0.1 < stats.ttest_1samp(hits, 0).confidence_interval().high <= found.high + 1e-12


def test_a_ratio_to_what_may_be_nothing_says_so() -> None:
    draws = np.random.default_rng(0)
    above = draws.normal(size=20)
    assert "not told from 0" in statistics.ratio_of_means(above, draws.normal(size=20)).words
    assert not statistics.ratio_of_means(above, 5 + draws.normal(size=20)).words
    alone = statistics.ratio_of_means([1.0, 2.0, 3.0], [0.0, 0.0, 2.0])
    assert not alone.known
    assert "0 without one of the groups" in alone.words


@pytest.mark.parametrize("place", [0, 1])
def test_a_class_of_one_group_leaves_a_difference_without_limits(place: int) -> None:
    whole, right = [[4, 4], [4, 4], [4, 4]], [[3, 3], [2, 3], [4, 2]]
    lone, hits = [[4, 4], [4, 0], [4, 0]], [[3, 3], [2, 0], [4, 0]]
    sides = [(hits, lone), (right, whole)]
    found = statistics.accuracy_difference(*sides[place], *sides[1 - place])
    assert not found.known
    assert "class 1 is in one group only" in found.words


@pytest.mark.parametrize("count", [2, 3])
def test_differences_of_accuracies_stay_within_1(count: int) -> None:
    rows = np.full((count, 2), 4.0)
    right = np.array([[4.0, 4.0], [3.0, 4.0], [4.0, 4.0]])[:count]
    found = statistics.accuracy_difference(right, rows, rows - right, rows)
    assert -1 <= found.low < found.estimate < found.high == 1
