"""Intervals of dimensions: from refits without each point, over all linked pairs, and right as often as they say."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tests.test_dimension_estimation import estimate, neighbourhoods, plane

LOCAL = [
    LocalKnnDimensionEstimator(k=8),
    LocalPcaDimensionEstimator(k=8, criterion="ratio"),
    LocalPcaDimensionEstimator(k=8),
    CaPcaDimensionEstimator(k=8),
]
ALL = [TwoNnDimensionEstimator(), TwoNnDimensionEstimator(discard=0.0), *LOCAL]


def torus(rows: int, dimension: int, seed: int) -> Tensor:
    """Points of a manifold that has no border, and whose density is everywhere the same."""
    numbers = torch.Generator().manual_seed(seed)
    angles = torch.rand(rows, dimension, generator=numbers, dtype=torch.float64) * 2 * math.pi
    return torch.cat([angles.cos(), angles.sin()], -1)


def slope(ratios: list[float], discard: float) -> float:
    count = len(ratios)
    x = np.log(sorted(ratios)[: max(2, min(count - 1, int(count * (1 - discard))))])
    y = [-math.log(1 - (place + 1) / count) for place in range(len(x))]
    return np.linalg.lstsq(x[:, None], np.array(y), rcond=None)[0].item()


def by_hand(influences: list[float], order: list[list[int]], groups: list[int]) -> float:
    """The variance, one pair at a time."""
    count, middle, sums, pairs = len(groups), np.mean(influences), [0.0, 0.0], [0, 0]
    for i, j in product(range(count), repeat=2):
        product_of_both = (influences[i] - middle) * (influences[j] - middle)
        same = groups[i] == groups[j]
        for at, linked in enumerate((same, same or j in order[i] or i in order[j])):
            sums[at] += product_of_both * linked
            pairs[at] += linked
    return max(one / count**2 / (1 - number / count**2) for one, number in zip(sums, pairs, strict=True))


@pytest.mark.parametrize("estimator", ALL, ids=["two_nn", "two_nn_all", "knn", "pca_ratio", "pca_gap", "ca_pca"])
@pytest.mark.parametrize("groups", [None, torch.arange(40) // 4, torch.arange(40) % 15])
def test_they_equal_sums_over_pairs_of_points(estimator, groups: Tensor | None) -> None:
    points = plane(40, 3, 5) * torch.tensor([1, 1, 1, 0.3, 0.2], dtype=torch.float64)
    near = neighbourhoods(points.numpy())
    if isinstance(estimator, TwoNnDimensionEstimator):
        ratios = [d[1] / d[0] for d, _ in near]
        whole, k = slope(ratios, estimator.discard), 2
        influences = [39 * (whole - slope(ratios[:i] + ratios[i + 1 :], estimator.discard)) for i in range(40)]
    else:
        influences, k = estimate(estimator, points).tolist(), 8
        whole = float(np.mean(influences))
    numbers = list(range(40)) if groups is None else groups.tolist()
    variance = by_hand(influences, [order[:k].tolist() for _, order in near], numbers)
    found = estimator.interval(points, groups, confidence=0.9)
    assert found.estimate == pytest.approx(whole)
    assert found.estimate == pytest.approx(float(estimate(estimator, points).mean()))
    from scipy import stats

    reach = stats.t.ppf(0.95, len(set(numbers)) - 1) * math.sqrt(variance)
    assert found.high - found.estimate == pytest.approx(reach, rel=1e-7)
    assert found.low == pytest.approx(max(found.estimate - reach, 0), rel=1e-7)
    assert (found.groups, found.rows) == (len(set(numbers)), 40)


@pytest.mark.parametrize(
    ("estimator", "least"), [(TwoNnDimensionEstimator(), 0.89), (LocalKnnDimensionEstimator(k=10), 0.93)]
)
@pytest.mark.parametrize("dimension", [1, 2])
def test_they_cover_on_manifolds_of_known_dimension(estimator, least: float, dimension: int) -> None:
    for rows, repeats in ((100, 100), (300, 40)):
        found = [estimator.interval(torus(rows, dimension, seed)) for seed in range(repeats)]
        # The mean of local estimates is off at few points, which is no matter of scatter.
        middle = np.mean([one.estimate for one in found])
        true = dimension if isinstance(estimator, TwoNnDimensionEstimator) else middle
        assert abs(middle - dimension) < 0.06 * dimension
        rate = np.mean([true in one for one in found])
        assert rate >= least, rate
        scatter = np.std([one.estimate for one in found])
        assert np.mean([one.half_width for one in found]) < 1.6 * 1.97 * scatter


def test_points_that_are_nearly_copies_are_no_evidence() -> None:
    few = torus(60, 2, 0)
    numbers = torch.Generator().manual_seed(1)
    # Each point eight times, in the same small cloud about it: what eight say is said once.
    cloud = torch.randn(8, 4, generator=numbers, dtype=torch.float64)
    many = (few[:, None] + 1e-3 * cloud).flatten(0, 1)
    groups = torch.arange(60).repeat_interleave(8)
    estimator = LocalKnnDimensionEstimator(k=12)
    by_group, by_row = estimator.interval(many, groups), estimator.interval(many)
    assert by_group.estimate == by_row.estimate
    assert by_group.half_width > by_row.half_width


def test_where_there_is_none_it_says_why() -> None:
    points = torus(40, 2, 0)
    for estimator in ALL:
        alone = estimator.interval(points, torch.zeros(40))
        assert not alone.known
        assert "one group only" in alone.words
        assert "only 4 groups" in estimator.interval(points, torch.arange(40) % 4).words or isinstance(
            estimator, LocalPcaDimensionEstimator
        )
        with pytest.raises(InputError, match="one cloud"):
            estimator.interval(points.expand(2, -1, -1))
        with pytest.raises(InputError, match="for 40 rows"):
            estimator.interval(points, torch.zeros(39))
        with pytest.raises(InputError, match="share between 0 and 1"):
            estimator.interval(points, confidence=95.0)
    line = torch.nn.functional.pad(torch.rand(60, 2, dtype=torch.float64), (0, 3))
    same = LocalPcaDimensionEstimator(k=10, criterion="ratio", alpha=0.001).interval(line)
    assert (same.low, same.high) == (2, 2)
    assert "say the same" in same.words
