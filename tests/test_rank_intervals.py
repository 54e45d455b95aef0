"""Intervals of the ranks and the norm of features: without each group by hand, and right as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.metrics import effective_rank, entropy_rank, stable_rank
from tdhook_rl.rollout import NetworkDiagnostics
from tdhook_rl.rollout.rank_spread import rank_intervals
from tdhook_rl.statistics import grouped_mean
from tests.test_imbalance_intervals import episodes

RANKS = {"entropy_rank": entropy_rank, "stable_rank": stable_rank}


def layer(count: int, steps: int, slow: float, seed: int) -> Tensor:
    turn = torch.randn(6, 24, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.tanh(episodes(count, steps, slow, torch.Generator().manual_seed(seed), 6) @ turn / 2)


@pytest.mark.parametrize("groups", [torch.arange(48) // 4, torch.arange(48) % 5])
def test_they_are_from_what_is_left_without_each_group(groups: Tensor) -> None:
    features, count = layer(12, 4, 0.5, 0), len(groups.unique())
    found = rank_intervals(features, groups)
    for name, rank in RANKS.items():
        left = np.array([rank(features[groups != group]) for group in range(count)])
        reach = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
        one = found[name]
        assert (one.estimate, one.high) == pytest.approx((rank(features), rank(features) + reach))
        assert (one.groups, one.rows) == (count, 48)
    norm = grouped_mean(features.norm(dim=-1), groups)
    assert (found["norm"].low, found["norm"].high) == (norm.low, norm.high)
    alone = rank_intervals(features, torch.zeros(48))
    assert not alone["stable_rank"].known
    assert "one group only" in alone["effective_rank"].words


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("groups", [torch.arange(48) // 4, torch.arange(48) % 5])
def test_an_effective_rank_holds_the_numbers_of_values_that_may_be_enough(groups: Tensor, delta: float) -> None:
    """A number is too few, or enough, where what is left over without so many values says so by a t test."""
    features, count = layer(12, 4, 0.5, 0), len(groups.unique())
    parts = [features, *(features[groups != group] for group in range(count))]
    values = [np.linalg.svd(one.numpy(), compute_uv=False) for one in parts]
    may_be = [effective_rank(features, delta)]
    for rank in range(1, 25):
        whole, *left = (np.arcsin(np.sqrt(max(1 - one[:rank].sum() / one.sum(), 0.0))) for one in values)
        reach = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * np.square(left - np.mean(left)).sum())
        if whole - reach <= np.arcsin(np.sqrt(delta)):
            may_be.append(rank)
        if whole + reach <= np.arcsin(np.sqrt(delta)):
            break
    found = rank_intervals(features, groups, delta)["effective_rank"]
    assert (found.low, found.estimate, found.high) == (min(may_be), may_be[0], max(may_be))


@pytest.mark.parametrize(("count", "steps", "slow"), [(60, 1, 0.0), (20, 8, 0.9)])
def test_they_cover_the_mean_of_as_many_states(count: int, steps: int, slow: float) -> None:
    groups = torch.arange(count).repeat_interleave(steps)
    found = [rank_intervals(layer(count, steps, slow, seed), groups) for seed in range(60)]
    whole = [one["effective_rank"] for one in found]
    assert np.mean([np.median([one.estimate for one in whole]) in one for one in whole]) >= 0.93
    assert np.mean([one.half_width for one in whole]) < 0.8
    for name in RANKS:
        values = np.array([one[name].estimate for one in found])
        assert np.mean([values.mean() in one[name] for one in found]) >= 0.9
        assert np.mean([one[name].half_width for one in found]) < 1.7 * 1.96 * values.std()
    assert {one["norm"].groups for one in found} == {one["stable_rank"].groups for one in found} == {count}


def test_diagnostics_have_them() -> None:
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    states = TensorDict({"input": torch.randn(60, 4), "collector": {"traj_ids": torch.arange(60) // 6}}, [60])
    diagnostics = NetworkDiagnostics(policy, sites=["1"])
    found = diagnostics.update(states)
    expected = rank_intervals(policy[:2](states["input"]).detach(), torch.arange(60) // 6)
    for name, one in expected.items():
        own = diagnostics.intervals[f"{name}/1"]
        assert own.estimate == pytest.approx(found[f"{name}/1"])
        assert (own.low, own.high, own.groups) == pytest.approx((one.low, one.high, 10), rel=1e-5)
    with torch.no_grad():
        policy[0].weight.fill_(torch.nan)
    diagnostics.update()
    assert not {f"{name}/1" for name in expected} & diagnostics.intervals.keys()
