"""Intervals of similarities: exact without each group, right as often as they say, and wherever the number is."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.latent.similarity_spread import (
    ByGroup,
    crossed_hsic,
    crossed_similarity,
    own_hsic,
    similarity_intervals,
)
from tdhook_rl.metrics import untrained_copy
from tdhook_rl.report.similarity import similarity_document, similarity_grids
from tdhook_rl.rollout import NetworkDiagnostics, cka_matrix
from tdhook_rl.statistics import grouped_mean, jackknife
from tests.test_imbalance_intervals import episodes
from tests.test_representation_similarity import hsic


def clouds(rows: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 5, generator=numbers, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(99), dtype=torch.float64)).Q
    return a, a @ turned + noise * torch.randn(rows, 5, generator=numbers, dtype=torch.float64)


def hsic_of(sides: list[Tensor], groups: Tensor, kind: str = "kernel") -> Tensor:
    return crossed_hsic(*(ByGroup(groups, **{kind: side}) for side in sides))[0]


def test_of_points_that_are_groups_it_is_the_usual_estimate() -> None:
    points = clouds(30, 0.5)
    kernels = [one @ one.mT for one in points]
    expected = hsic(*(one.numpy() for one in kernels), debiased=True) * 30 * 29 * 28 * 27 / 30**2
    for kind, sides in (("kernel", kernels), ("features", points)):
        assert float(hsic_of(sides, torch.arange(30), kind)[-1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [1, 3, 2, 1, 2], [1, 1, 1, 1, 5]])
def test_it_is_the_sum_over_points_of_different_groups(sizes: list[int]) -> None:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups))]
    points = clouds(len(groups), 0.5)
    k, m = ((one @ one.mT).tolist() for one in points)
    number = groups.tolist()
    for left in (None, *range(len(sizes))):
        kept = [row for row in range(len(number)) if number[row] != left]
        total = sum(
            k[i][j] * (m[i][j] - 2 * m[i][x] + m[x][y])
            for i, j, x, y in permutations(kept, 4)
            if len({number[i], number[j], number[x], number[y]}) == 4
        )
        for kind, sides in (("kernel", [one @ one.mT for one in points]), ("features", points)):
            found = hsic_of(sides, groups, kind)[-1 if left is None else left]
            assert float(found) * len(number) ** 2 == pytest.approx(total, rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("groups", [torch.arange(40), torch.arange(40) // 4, (torch.arange(40) ** 1.2 // 9).long()])
def test_without_each_group_it_is_what_it_is_of_the_others(kernel: str, groups: Tensor) -> None:
    estimator = CkaEstimator(debiased=True, kernel=kernel)  # type: ignore[arg-type]
    kernels = [estimator.kernel_matrix(one) for one in clouds(40, 0.5)]
    whole = similarity_intervals(kernels, groups)[0][1]
    sides = [ByGroup(groups, kernel=one) for one in kernels]
    left = crossed_similarity(crossed_hsic(*sides)[0], [own_hsic(one) for one in sides])
    assert whole.estimate == pytest.approx(float(left[-1]))
    for group in range(int(groups.max()) + 1):
        kept = groups != group
        numbers = groups[kept].unique(return_inverse=True)[1]
        # Centred about all points: what that adds depends on one point alone.
        part = similarity_intervals([one[kept][:, kept] for one in kernels], numbers)[0][1]
        assert part.estimate == pytest.approx(float(left[group]))


@pytest.mark.parametrize("sizes", [[50] * 5, [20] * 10, [5, 60, 20, 40, 10, 30]])
def test_unrelated_episodes_have_nothing_in_common(sizes: list[int]) -> None:
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    estimator, found, plain = CkaEstimator(debiased=True), [], []
    for seed in range(60):
        numbers = torch.Generator().manual_seed(seed)
        a, b = (episodes(len(sizes), max(sizes), 0.9, numbers, 8).reshape(len(sizes), -1, 8) for _ in range(2))
        a, b = (torch.cat([of[:size] for of, size in zip(side, sizes, strict=True)]) for side in (a, b))
        found.append(estimator.interval(a, b, groups))
        plain.append(float(estimator(TensorDict({"data_a": a, "data_b": b}))["cka"]))
    known = [one for one in found if one.known]
    assert len(known) > 0.9 * len(found)
    values = np.array([one.estimate for one in known])
    assert abs(values.mean()) < 0.04 < 0.08 < np.mean(plain)
    assert np.sqrt(np.mean(values**2)) < np.sqrt(np.mean(np.square(plain)))
    assert np.mean([0 in one for one in known]) >= 0.93
    assert estimator.interval(a, a + 0.5 * b, groups).low > 0


def test_below_four_groups_pairs_within_stay_in() -> None:
    a, b = clouds(24, 0.5)
    estimator = CkaEstimator(debiased=True)
    among_all = float(estimator(TensorDict({"data_a": a, "data_b": b}))["cka"])
    for count, said in ((1, "one group only: below 4"), (3, "only 3 groups: below 4"), (4, "not defined without")):
        found = estimator.interval(a, b, torch.arange(24) % count)
        assert not found.known
        assert said in found.words
        assert (found.estimate == pytest.approx(among_all)) == (count < 4)
    # Alike in all groups but one: there are no four of which it is not.
    a[:18] = a[0]
    assert np.isnan(estimator.interval(a, b, torch.arange(24) // 6).estimate)


def test_of_a_mean_it_is_the_usual_interval() -> None:
    values = np.random.default_rng(0).normal(size=(12, 5)) + np.arange(12)[:, None] / 4
    without = [np.delete(values, group, 0).mean() for group in range(12)]
    found = jackknife(float(values.mean()), without, rows=60)
    usual = grouped_mean(values.reshape(-1), np.repeat(np.arange(12), 5), method="t")
    assert (found.low, found.high) == pytest.approx((usual.low, usual.high))
    assert (found.groups, found.rows, found.method) == (12, 60, "jackknife by group")


@pytest.mark.parametrize(
    ("without", "said"), [([0.5], "one group"), ([0.5, np.nan], "not defined without"), ([0.5, 1.0], "bound")]
)
def test_where_there_is_none_it_says_why(without: list[float], said: str) -> None:
    found = jackknife(0.5, without, rows=9, correlation=True)
    assert not found.known
    assert said in found.words
    assert not jackknife(float("nan"), [0.1, 0.2], rows=9).known
    beyond = jackknife(1.02, [0.9, 0.95, 0.97], rows=9, correlation=True)  # a debiased figure may be
    assert not beyond.known
    assert "bound" in beyond.words
    with pytest.raises(InputError, match="there are none"):
        jackknife(0.5, [], rows=9)


@pytest.mark.parametrize(("noise", "rows"), [(0.3, 12), (1.0, 30), (3.0, 60)])
def test_it_covers(noise: float, rows: int) -> None:
    estimator = CkaEstimator(debiased=True)
    a, b = clouds(20_000, noise, seed=12345)
    true = float(estimator(TensorDict({"data_a": a, "data_b": b}))["cka"])
    found = [estimator.interval(*clouds(rows, noise, seed)) for seed in range(150)]
    assert np.mean([true in one for one in found]) >= 0.9
    assert all(-1 <= one.low <= one.estimate <= one.high <= 1 for one in found)
    assert np.mean([one.high - one.low for one in found]) < 1.0


def test_rows_that_are_copies_are_no_evidence() -> None:
    a, b = clouds(20, 0.5)
    estimator, groups = CkaEstimator(debiased=True), torch.arange(20).repeat_interleave(10)
    many = a.repeat_interleave(10, 0), b.repeat_interleave(10, 0)
    copied = estimator.interval(*many, groups)
    assert copied.half_width > 0.5 * estimator.interval(a, b).half_width
    assert estimator.interval(*many).half_width < 0.5 * copied.half_width
    with pytest.raises(InputError, match="debiased=True"):
        CkaEstimator().interval(a, b)


@pytest.mark.parametrize("width", [8, 40, 70])
def test_diagnostics_have_them(width: int) -> None:
    policy = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    states = TensorDict({"input": torch.randn(60, 4), "collector": {"traj_ids": torch.arange(60) // 6}}, [60])
    diagnostics = NetworkDiagnostics(policy, sites=["1"])
    before = policy[1](policy[0](states["input"])).detach()
    diagnostics.update(states)
    assert diagnostics.intervals["cka_first/1"].low == pytest.approx(1)
    assert "cka_last/1" not in diagnostics.intervals
    with torch.no_grad():
        policy[0].weight.add_(torch.randn(width, 4))
    found = diagnostics.update()
    by_hand = CkaEstimator(debiased=True).interval(
        before, policy[1](policy[0](states["input"])).detach(), torch.arange(60) // 6
    )
    for name in ("cka_first/1", "cka_last/1"):
        one = diagnostics.intervals[name]
        assert one.estimate == pytest.approx(found[name], abs=1e-6)
        assert (one.low, one.high, one.groups) == pytest.approx((by_hand.low, by_hand.high, 10), abs=1e-4)
    with torch.no_grad():
        policy[0].weight.fill_(torch.nan)
    diagnostics.update()
    assert "cka_last/1" not in diagnostics.intervals


def test_a_matrix_a_figure_and_a_file_have_them() -> None:
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    episode = torch.arange(60) // 6
    states = TensorDict({"input": torch.randn(60, 4), "collector": {"traj_ids": episode}}, [60])
    silent = policy.state_dict() | {"0.weight": torch.zeros(8, 4)}
    other = untrained_copy(policy)
    found = cka_matrix(policy, {"one": policy, "other": other, "silent": silent}, ["1"], states)
    assert found.groups == 10
    own, apart = found.interval(("one", "1"), ("one", "1")), found.interval(("one", "1"), ("other", "1"))
    assert (own.low, own.high) == pytest.approx((1, 1))
    activations = [net[1](net[0](states["input"])).detach() for net in (policy, other)]
    by_hand = CkaEstimator(debiased=True).interval(*activations, episode)
    assert (apart.low, float(apart), apart.high) == pytest.approx((by_hand.low, float(by_hand), by_hand.high), abs=1e-5)
    assert not found.interval(("one", "1"), ("silent", "1")).known
    (drawing,) = similarity_grids(found)
    assert "10 groups: episodes, where these are known" in drawing.caption
    assert "Only states of different groups are compared." in drawing.caption
    assert {(one["row"], one["column"]) for one in drawing.data["intervals"]} >= {("one", "other"), ("other", "one")}
    document = json.loads(json.dumps(similarity_document(found)))
    assert document["low"]["1"][0][1] == pytest.approx(apart.low)
    assert document["high"]["1"][0][2] is None
    without = cka_matrix(policy, [policy, other], ["1"], states.select("input"))
    assert without.groups == 60
    assert "different groups" not in similarity_grids(without)[0].caption
    few = cka_matrix(policy, [policy, other], ["1"], states.clone().set(("collector", "traj_ids"), episode * 0))
    assert "one group only" in similarity_grids(few)[0].caption
    assert similarity_document(few)["words"].startswith("one group only")
