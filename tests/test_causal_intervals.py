"""Intervals of how far estimates are off, and of what changes without a unit: by hand, and as often as they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.latent import SteeringVector
from tdhook_rl.statistics import bootstrap, ratio_of_means
from tdhook_rl.sweeps import AblationCell, AblationTable, ablate_units, attribution_patching, patch_sites

MEASURED = {"metric": "output", "compare": "all"}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


def states(rows: int, seed: int) -> tuple[TensorDict, TensorDict]:
    numbers = torch.Generator().manual_seed(seed)
    one = torch.randn(rows, 3, generator=numbers, dtype=torch.float64)
    other = one + torch.randn(rows, 3, generator=numbers, dtype=torch.float64) + 0.5
    return TensorDict({"input": one}, rows), TensorDict({"input": other}, rows)


def figures(estimates: Tensor, changes: Tensor, gaps: Tensor) -> dict[str, float]:
    shares = [((one * gaps.sign()).sum(-1) / gaps.abs().sum()).numpy() for one in (estimates, changes)]
    far = np.abs(shares[0] - shares[1])
    error = far.mean() / np.abs(shares[1]).mean()
    return {"correlation": np.corrcoef(*shares)[0, 1], "error": error, "largest": far.max()}


@pytest.mark.parametrize("groups", [None, torch.arange(30) // 3, torch.arange(30) % 4])
def test_an_agreement_is_that_without_each_group(groups: Tensor | None) -> None:
    from scipy import stats

    table = attribution_patching(network(), *states(30, 1), ["0", "2"], groups=groups, **MEASURED)
    found, gaps = table.agreement, table.gap.source - table.gap.base
    whole = figures(table.estimates, table.changes, gaps)
    numbers = torch.arange(30) if groups is None else groups
    count = len(numbers.unique())
    left = [
        figures(table.estimates[:, numbers != group], table.changes[:, numbers != group], gaps[numbers != group])
        for group in range(count)
    ]
    for name, value in whole.items():
        one = found.intervals[name]
        assert getattr(found, name) == pytest.approx(value)
        assert (one.estimate, one.groups, one.rows) == (getattr(found, name), count, 30)
        scale, back = (np.arctanh, np.tanh) if name == "correlation" else (np.array, np.array)
        values = scale([each[name] for each in left])
        reach = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * np.square(values - values.mean()).sum())
        assert one.high == pytest.approx(float(back(scale(value) + reach)))
        low = float(back(scale(value) - reach))
        assert one.low == pytest.approx(low if name == "correlation" else max(low, 0))
    assert f"correlation {whole['correlation']:.3f} [{found.intervals['correlation'].low:.3f}, " in str(found)
    assert f"mean error {whole['error']:.1%} [" in str(table)


@pytest.mark.parametrize("groups", [None, torch.arange(30) // 3, torch.arange(30) % 4, torch.arange(30) * 0])
def test_a_pooled_share_is_a_ratio_by_group(groups: Tensor | None) -> None:
    """Of weights: the differences of two runs, of which a few may be most."""
    net, (clean, corrupt) = network(), states(30, 1)
    clean["input"][:3] *= 5.0
    direction = SteeringVector(vector=torch.ones(6), path="0")
    cell = patch_sites(net, clean, corrupt, ["0"], direction=direction, groups=groups, metric="output")[0]
    base, source = (net(one["input"]).detach().squeeze(-1) for one in (corrupt, clean))
    gap = source - base
    above = cell.shares * gap.abs()
    by_hand = ratio_of_means(above, gap.abs(), torch.arange(30) if groups is None else groups)
    found = cell.pooled_interval
    assert found.estimate == pytest.approx(cell.pooled) == pytest.approx(by_hand.estimate)
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high), nan_ok=True)
    assert (found.known, found.groups) == (by_hand.known, by_hand.groups)
    assert cell.numbers()["pooled_high"] == pytest.approx(found.high, nan_ok=True)


@pytest.mark.parametrize("groups", [None, torch.arange(60) // 3, torch.arange(60) % 12, torch.arange(60) % 4])
def test_the_size_of_a_share_has_an_interval_by_group(groups: Tensor | None) -> None:
    net, (clean, corrupt) = network(), states(60, 1)
    direction = SteeringVector(vector=torch.tensor([1.0, -1.0, 0.0, 2.0, 0.0, 0.0]), path="0")
    table = patch_sites(net, clean, corrupt, ["0"], direction=direction, groups=groups, metric="output", controls=20)
    cell = table["0", "direction"]
    numbers = torch.arange(60) if groups is None else groups

    def size(shares: Tensor) -> float:
        return float(np.median([float(shares.abs()[numbers == group].mean()) for group in numbers.unique()]))

    sizes = [size(shares) for shares in cell.at_random]
    assert cell.size == pytest.approx(size(cell.shares))
    assert cell.random.estimate == pytest.approx(np.mean(sizes))
    assert cell.p == (1 + sum(one >= cell.size for one in sizes)) / 21
    found, by_hand = cell.size_interval, bootstrap(np.median, cell.shares.abs(), groups)
    assert (found.estimate, found.groups, found.rows) == (pytest.approx(cell.size), len(numbers.unique()), 60)
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high), nan_ok=True)
    assert found.known == (len(numbers.unique()) >= 10) == (f"{cell.size:.3f} [{found.low:.3f}, " in str(table))
    (record,) = [one for one in json.loads(table.json()) if one["patch"] == "direction"]
    assert record["size"] == pytest.approx(cell.size)
    assert (record["size_low"] is None) == (not found.known)


def test_they_cover() -> None:
    net = network()
    true = attribution_patching(net, *states(8000, 9999), ["0", "2"], **MEASURED).agreement
    found = [attribution_patching(net, *states(40, seed), ["0", "2"], **MEASURED).agreement for seed in range(60)]
    for name in ("correlation", "error", "largest"):
        intervals = [one.intervals[name] for one in found]
        assert np.mean([getattr(true, name) in one for one in intervals]) >= 0.93, name
        scatter = np.std([one.estimate for one in intervals])
        assert np.mean([one.half_width for one in intervals]) < 1.8 * 1.96 * scatter


def test_sizes_cover() -> None:
    critic = TensorDictModule(network(), ["input"], ["state_value"])
    options = {"by": "zero"}  # what is put in is the same in all states
    true = ablate_units(critic, states(8000, 9999)[0], "module.1", **options)
    tables = (ablate_units(critic, states(40, seed)[0], "module.1", **options) for seed in range(60))
    assert np.mean([true[one.site, one.unit].size in one.size_interval for table in tables for one in table]) >= 0.9


def test_where_there_is_none_it_says_why() -> None:
    net, two = network(), states(12, 0)
    alone = attribution_patching(net, *two, ["0"], groups=torch.zeros(12), **MEASURED).agreement
    assert all("one group only" in one.words for one in alone.intervals.values())
    assert "correlation 0." in str(alone)
    assert "[" not in str(alone)
    single = attribution_patching(net, *two, ["0"], metric="output", compare=1).agreement
    assert np.isnan(single.correlation)
    assert not single.intervals["correlation"].known
    assert single.intervals["largest"].known


@pytest.mark.parametrize("groups", [None, torch.arange(20) // 4])
def test_what_is_taken_out_has_an_interval_of_its_size(groups: Tensor | None) -> None:
    critic = TensorDictModule(network(), ["input"], ["state_value"])
    table = ablate_units(critic, states(20, 0)[0], "module.1", groups=groups)
    by_name = {name: place for place, name in enumerate(table.components.names)}
    for cell, record in zip(table, json.loads(table.json()), strict=True):
        sizes = table.changes["value"][by_name[cell.site, cell.unit]].abs()
        means = sizes if groups is None else sizes.reshape(5, 4).mean(1)
        reach = {20: 2.0930, 5: 2.7764}[len(means)] * float(means.std()) / len(means) ** 0.5
        one = cell.size_interval
        assert (one.estimate, one.low, one.high) == pytest.approx(
            (cell.size, cell.size - reach, cell.size + reach), rel=1e-4
        )
        assert (record["size"], record["size_low"]) == pytest.approx((cell.size, one.low))
        assert f"{one:.3g} [{one.low:.3g}, {one.high:.3g}]" in str(table)
    assert table[0].size > abs(float(table[0].value))  # changes of both signs


def test_a_size_that_is_infinite_in_a_state_is_no_mean_of_the_others() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[..., 1:] > 0, 1 / x[..., :1], x[..., :1])

    critic = TensorDictModule(nn.Sequential(nn.Identity(), Inverse()), ["input"], ["state_value"])
    seen = torch.rand(8, 2) + 1
    seen[2:, 1] = -1
    table = ablate_units(critic, TensorDict({"input": seen}, 8), "module.0", by="zero")
    first, second = table
    assert (first.unit, first.size_interval.known, second.size_interval.known) == (0, False, True)
    assert "infinite in some" in first.size_interval.words
    # A cell of one's own needs none.
    own = AblationCell(site="a", unit=0, size=2.0)
    made = AblationTable([own], replaced="zero", ranked="kl", changes={}, components=table.components, words="")
    assert made.columns()[1][0][2] == "2"
    assert own.numbers() == {"site": "a", "unit": 0, "size": 2.0, "words": ""}
