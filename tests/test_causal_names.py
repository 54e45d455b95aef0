"""What causal tests are told by name: runs that have two names, circuits of other networks, outputs as metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueActor, ValueOperator

from tdhook_rl.errors import InputError, SiteError, TargetError
from tdhook_rl.sweeps import ablate_units, faithfulness, find_circuit, patch_paths, patch_sites, patch_units


class Shared(nn.Module):
    """Runs one activation twice, which has two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.act = nn.Tanh()
        self.alias = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.first(x)))))


def states(seed: int = 0, rows: int = 10) -> TensorDict:
    torch.manual_seed(seed)
    return TensorDict({"input": torch.randn(rows, 3, dtype=torch.float64)}, [rows])


@pytest.mark.parametrize(
    ("one", "other"),
    [("act@0", "act@-2"), ("act@1", "act@-1"), ("act@0", "act@all"), ("act@all", "act@-1"), ("first", "first@0"),
     ("first", "[0]"), ("first@-1", "<first>"), ("act@0", "alias@0"), ("alias@1", "act@-1")],
)  # fmt: skip
def test_a_run_counts_once(one: str, other: str) -> None:
    net, clean, corrupt = Shared().double(), states(), states(1)
    for call in (
        lambda: patch_paths(net, clean, corrupt, one, other),
        lambda: patch_paths(net, clean, corrupt, [one, other], "last"),
        lambda: patch_paths(net, clean, corrupt, "second", [other, one]),
        lambda: patch_paths(net, clean, corrupt, one, "last", held=other),
        lambda: find_circuit(net, clean, corrupt, [one, other], controls=0),
        lambda: faithfulness(net, clean, corrupt, {one: [0], other: [1]}),
    ):
        with pytest.raises(SiteError, match="one run of a module, or share one"):
            call()
    assert len(patch_sites(net, clean, corrupt, [one, other])) == 2  # each by itself


@pytest.mark.parametrize(("one", "other"), [("act@0", "act@-1"), ("act@0", "alias@1"), ("first@0", "second@0")])
def test_runs_apart_are_two(one: str, other: str) -> None:
    net, clean, corrupt = Shared().double(), states(), states(1)
    assert [cell.site for cell in patch_paths(net, clean, corrupt, one, other)] == [f"{one} -> {other}"]
    assert faithfulness(net, clean, corrupt, {one: range(4), other: range(4)}).estimate == pytest.approx(1.0)


def layers(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()


@pytest.mark.parametrize("width", [2, 4, 6, 9, 12, 24])
@pytest.mark.parametrize("parts", [None, {"1": 3}, {"1": 6}])
@pytest.mark.parametrize("again", [False, True])
def test_a_circuit_is_of_networks_of_one_width(width: int, parts: dict[str, int] | None, again: bool) -> None:
    clean, corrupt = states(), states(1)
    circuit = find_circuit(layers(6), clean, corrupt, "1", keep=0.5, parts=parts, controls=0)
    net, options = layers(width), {"parts": parts} if again else {}
    if width != 6:
        with pytest.raises(InputError, match=f"among 6 units of '1', and this network has {width}"):
            faithfulness(net, clean, corrupt, circuit, **options)
        return
    found = faithfulness(net, clean, corrupt, circuit, **options).estimate
    size = 6 // (parts or {"1": 6})["1"]
    kept = [unit for part in circuit.units["1"] for unit in range(part * size, (part + 1) * size)]
    own, other = (net[:2](one["input"]) for one in (clean, corrupt))
    mixed = other.clone()
    mixed[:, kept] = own[:, kept]
    whole, nothing, left = (net[2](one).squeeze(-1) for one in (own, other, mixed))
    sign = torch.sign(whole - nothing)
    expected = ((left - nothing) * sign).sum() / (whole - nothing).abs().sum()
    assert found == pytest.approx(expected.item())


def body(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def drawn(kind: Any) -> Callable[[], nn.Module]:
    return lambda: ProbabilisticActor(
        TensorDictModule(body(3), in_keys=["input"], out_keys=["logits"]), in_keys=["logits"], distribution_class=kind
    )


POLICIES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "indices": (drawn(Categorical), "module.0.module.1", "logits"),
    "one-hot": (drawn(OneHotCategorical), "module.0.module.1", "logits"),
    "values": (lambda: QValueActor(body(3), in_keys=["input"], action_space="categorical"), "module.0.module.1",
               "action_value"),
    "deterministic": (lambda: TensorDictModule(body(2), ["input"], ["action"]), "module.1", "action"),
    "agents": (lambda: TensorDictModule(body(2), ["input"], [("agents", "action")]), "module.1", "action"),
    "critic": (lambda: ValueOperator(body(1), in_keys=["input"]), "module.1", "state_value"),
}  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "patch_sites": lambda policy, site, metric: patch_sites(policy, states(), states(1), site, metric=metric),
    "patch_units": lambda policy, site, metric: patch_units(policy, states(), states(1), site, metric=metric),
    "ablate_units": lambda policy, site, metric: ablate_units(policy, states(), site, metric=metric),
    "find_circuit": lambda policy, site, metric: find_circuit(
        policy, states(), states(1), site, metric=metric, controls=0
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", POLICIES)
def test_an_output_as_a_metric_is_called_by_its_name(name: str, call: str) -> None:
    make, site, key = POLICIES[name]
    policy = make()
    CALLS[call](policy, site, key)
    with pytest.raises(TargetError, match="metric='nothing' reads 'nothing'"):
        CALLS[call](policy, site, "nothing")
    if name in ("indices", "one-hot", "values"):
        with pytest.raises(InputError, match=r"metric='action' is torch.int64.*outputs\['action'\] == 1"):
            CALLS[call](policy, site, "action")


@pytest.mark.parametrize("name", POLICIES)
def test_an_output_as_a_metric_is_the_sum_of_its_features(name: str) -> None:
    make, site, key = POLICIES[name]
    policy, clean, corrupt = make(), states(), states(1)
    table = patch_sites(policy, clean, corrupt, site, metric=key)
    last = ("agents", key) if name == "agents" else key
    ends = [policy(one.clone())[last].flatten(1).sum(-1) for one in (clean, corrupt)]
    assert table.metric == key
    torch.testing.assert_close(table[site].mean.estimate, 1.0)
    by_function = patch_sites(policy, clean, corrupt, site, metric=lambda outputs: outputs[last])
    assert by_function[site].mean == table[site].mean
    assert not torch.equal(*ends)
