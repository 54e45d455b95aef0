"""Intervals of information imbalance: among points of other groups, exact, and right as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.representation_similarity import InformationImbalanceEstimator
from tests.test_representation_similarity import imbalance, pair

ESTIMATOR = InformationImbalanceEstimator()


def episodes(count: int, steps: int, slow: float, numbers: torch.Generator, width: int = 3) -> Tensor:
    """Independent episodes of which each step is near the one before."""
    values = torch.randn(count, steps, width, generator=numbers, dtype=torch.float64)
    for step in range(1, steps):
        values[:, step] = slow * values[:, step - 1] + (1 - slow**2) ** 0.5 * values[:, step]
    return values.flatten(0, 1)


def ranks(a: np.ndarray, b: np.ndarray, groups: list[int]) -> list[float]:
    """Of each point the rank in b of those nearest in a, over half of one more than there are, others' points only."""
    found = []
    for i in range(len(a)):
        others = [j for j in range(len(a)) if groups[j] != groups[i]]
        near, far = ({j: np.linalg.norm(x[i] - x[j]) for j in others} for x in (a, b))
        nearest = [j for j in others if near[j] == min(near.values())]
        of_each = [
            sum(far[k] < far[j] for k in others) + (sum(far[k] == far[j] for k in others) + 1) / 2 for j in nearest
        ]
        found.append(2 * float(np.mean(of_each)) / (len(others) + 1))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [None, [i // 4 for i in range(24)], [i % 7 for i in range(24)]])
def test_they_equal_counting(groups: list[int] | None, tied: bool) -> None:
    a, b = pair(24, 3, 2)
    if tied:
        a, b = a.round(), (b / 4).round()
    numbers = groups or list(range(24))
    found = ESTIMATOR.interval(a, b, None if groups is None else torch.tensor(groups))
    for one, (x, y) in zip(found, ((a, b), (b, a)), strict=True):
        assert one.estimate == pytest.approx(np.mean(ranks(x.numpy(), y.numpy(), numbers)))
        assert one.low < one.estimate < one.high
        assert (one.groups, one.rows) == (len(set(numbers)), 24)
    if groups is None:
        assert [float(one) for one in found] == pytest.approx([value.item() for value in imbalance(a, b)])


def test_the_scatter_is_that_of_leaving_points_out() -> None:
    a, b = pair(40, 3, 2)
    whole = ranks(a.numpy(), b.numpy(), list(range(40)))
    apart = [torch.cdist(x, x).fill_diagonal_(np.inf).numpy() for x in (a, b)]
    nearest = apart[0].argmin(1)
    influences = []
    for left in range(40):  # out, with the neighbours of the others as they were
        own = [
            1 + sum(apart[1][i] < apart[1][i, nearest[i]]) - (apart[1][i, left] < apart[1][i, nearest[i]])
            for i in range(40)
        ]
        own = [2 * rank / 40 for i, rank in enumerate(own) if i != left]
        influences.append(40 * np.mean(whole) - sum(own))
    along = np.array(influences) - np.mean(influences)
    linked = np.eye(40, dtype=bool)
    linked[range(40), nearest] = linked[nearest, range(40)] = True
    sizes = [pairs.sum() / 1600 for pairs in (np.eye(40), linked)]
    variance = max(
        along @ pairs @ along / 1600 / (1 - size) for pairs, size in zip((np.eye(40), linked), sizes, strict=True)
    )
    found = ESTIMATOR.interval(a, b)[0]
    # A rank is a half more where it is its own neighbour that is left out: one point in forty.
    assert found.half_width == pytest.approx(2.0227 * np.sqrt(variance), rel=0.03)


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize(("count", "steps", "slow"), [(80, 1, 0.0), (10, 12, 0.9)])
def test_they_cover(related: bool, count: int, steps: int, slow: float) -> None:
    groups = torch.arange(count).repeat_interleave(steps)
    found, plain = [], []
    for seed in range(60):
        numbers = torch.Generator().manual_seed(seed)
        a, noise = (episodes(count, steps, slow, numbers) for _ in range(2))
        b = a + 0.5 * noise if related else noise
        found.append(ESTIMATOR.interval(a, b, groups)[0])
        plain.append(float(imbalance(a, b)[0]))
    middle = np.mean([one.estimate for one in found])
    rate = np.mean([(middle if related else 1.0) in one for one in found])
    assert rate >= (0.88 if related else 0.93), rate
    scatter = np.std([one.estimate for one in found])
    assert np.mean([one.half_width for one in found]) < 1.7 * 1.96 * scatter
    if not related:
        assert abs(middle - 1) < 0.03
        assert steps == 1 or np.mean(plain) < 0.85  # the next step is near in both


def test_where_there_is_none_it_says_why() -> None:
    a, b = pair(20, 3, 2)
    for one in ESTIMATOR.interval(a, b, torch.zeros(20)):
        assert not one.known
        assert "one group only" in one.words
    assert float(one) == pytest.approx(float(imbalance(a, b)[1]))
    assert "only 4 groups" in ESTIMATOR.interval(a, b, torch.arange(20) % 4)[0].words
    constant = ESTIMATOR.interval(a, torch.full((20, 2), 0.3, dtype=torch.float64))
    assert [float(one) for one in constant] == pytest.approx([1, 1])
    for wrong, message in (((a[None], b[None]), "two clouds"), ((a, b, torch.zeros(19)), "for 20 rows")):
        with pytest.raises(InputError, match=message):
            ESTIMATOR.interval(*wrong)
