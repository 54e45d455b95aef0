"""Intervals of similarities: exact without each group, right as often as they say, and wherever the number is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.latent.similarity_spread import _of_groups, _without
from tdhook_rl.metrics import untrained_copy
from tdhook_rl.report.similarity import similarity_document, similarity_grids
from tdhook_rl.rollout import NetworkDiagnostics, cka_matrix
from tdhook_rl.statistics import grouped_mean, jackknife


def clouds(rows: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 5, generator=numbers, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(99), dtype=torch.float64)).Q
    return a, a @ turned + noise * torch.randn(rows, 5, generator=numbers, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(
    "groups", [torch.arange(40), torch.arange(40) // 4, torch.arange(40) % 3, torch.arange(40) // 25]
)
def test_without_each_group_it_is_what_it_is_of_the_others(kernel: str, groups: Tensor) -> None:
    estimator = CkaEstimator(debiased=True, kernel=kernel)  # type: ignore[arg-type]
    kernels = [estimator.kernel_matrix(one) for one in clouds(40, 0.5)]
    parts = [_of_groups(one, groups) for one in kernels]
    for one, other in ((0, 0), (0, 1)):
        found = _without(kernels[one], kernels[other], parts[one], parts[other], groups)
        for group, value in enumerate(found):
            first, second = (kernels[at][groups != group][:, groups != group] for at in (one, other))
            n = len(first)
            sums = first.sum() * second.sum() / ((n - 1) * (n - 2)) - 2 * (first @ second).sum() / (n - 2)
            torch.testing.assert_close(value, (first * second).sum() + sums)
    if kernel == "linear":
        left = estimator.matrix([one[groups != 0] for one in clouds(40, 0.5)])[0, 1]
        own = [_without(kernels[at], kernels[at], parts[at], parts[at], groups)[0] for at in (0, 1)]
        torch.testing.assert_close(found[0] / (own[0] * own[1]).sqrt(), left)


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


@pytest.mark.parametrize("width", [8, 70])
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
    assert {(one["row"], one["column"]) for one in drawing.data["intervals"]} >= {("one", "other"), ("other", "one")}
    document = json.loads(json.dumps(similarity_document(found)))
    assert document["low"]["1"][0][1] == pytest.approx(apart.low)
    assert document["high"]["1"][0][2] is None
    assert cka_matrix(policy, [policy, other], ["1"], states.select("input")).groups == 60
    few = cka_matrix(policy, [policy, other], ["1"], states.clone().set(("collector", "traj_ids"), episode * 0))
    assert "one group only" in similarity_grids(few)[0].caption
    assert similarity_document(few)["words"].startswith("one group only")
