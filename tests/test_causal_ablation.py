"""Components taken out: what changes is what changes by hand, and returns are of the same seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import Actor, ProbabilisticActor, QValueActor

from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2
from tdhook_rl.experiments import load
from tdhook_rl.sweeps import ablate_units

STATES = 9


def layers(outputs: int) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def states(*batch: int) -> TensorDict:
    value = torch.randn(*batch or (STATES,), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDict({"seen": value}, batch or (STATES,))


def without(net: nn.Sequential, x: Tensor, units: list[int], by: str, other: Tensor | None = None) -> Tensor:
    """The output of a network, its units 3 layers in replaced by hand."""
    with torch.no_grad():
        hidden = net[:2](x)
        held = {"zero": torch.zeros_like(hidden), "mean": hidden.mean(0).expand_as(hidden)}.get(by)
        held = net[:2](x)[other] if held is None else held
        hidden[:, units] = held[:, units]
        return net[2](hidden)


@pytest.mark.parametrize("by", ["zero", "mean"])
@pytest.mark.parametrize("kind", ["discrete", "continuous", "deterministic", "values", "critic"])
def test_what_changes_is_what_changes_by_hand(kind: str, by: str) -> None:
    net = layers({"discrete": 4, "continuous": 2, "deterministic": 2, "values": 4, "critic": 1}[kind])
    policy: Any
    if kind == "discrete":
        policy = ProbabilisticActor(
            TensorDictModule(net, ["seen"], ["scores"]), {"logits": "scores"}, distribution_class=Categorical
        )
    elif kind == "continuous":
        both = nn.Sequential(net, Spread())
        module = TensorDictModule(both, ["seen"], ["loc", "scale"])
        policy = ProbabilisticActor(module, ["loc", "scale"], distribution_class=Normal)
    elif kind == "deterministic":
        policy = Actor(net, in_keys=["seen"])
    elif kind == "values":
        policy = QValueActor(net, in_keys=["seen"], spec=CategoricalSpec(4))
    else:
        policy = TensorDictModule(net, ["seen"], ["state_value"])
    (site,) = (name for name, one in policy.named_modules() if one is net[1])
    data, x = states(), states()["seen"]
    halves = ablate_units(policy, data, site, by=by, parts={site: 2})
    table = ablate_units(policy, data, site, by=by, chunk_size=20)
    whole = net(x).detach()
    for found, sets in ((table, [[unit] for unit in range(6)]), (halves, [[0, 1, 2], [3, 4, 5]])):
        for place, units in enumerate(sets):
            now = without(net, x, units, by)
            cell, changes = found[site, place], {name: one[place] for name, one in found.changes.items()}
            if kind == "discrete":
                expected = kl_divergence(Categorical(logits=whole), Categorical(logits=now))
                torch.testing.assert_close(changes["kl"], expected, rtol=1e-6, atol=1e-12)
                assert float(cell.kl) == pytest.approx(float(expected.mean()))
            elif kind == "continuous":
                expected = kl_divergence(Normal(whole, 0.5), Normal(now, 0.5)).sum(-1)
                torch.testing.assert_close(changes["kl"], expected, rtol=1e-6, atol=1e-12)
                assert "changed" not in changes  # any change of a real number is one
            elif kind == "deterministic":
                torch.testing.assert_close(changes["moved"], (now - whole).norm(dim=-1))
                assert float(cell.moved) == pytest.approx(float(changes["moved"].mean()))
            else:
                action = (
                    whole.argmax(-1, keepdim=True) if kind == "values" else torch.zeros(STATES, 1, dtype=torch.long)
                )
                torch.testing.assert_close(changes["value"], (now - whole).gather(-1, action).squeeze(-1))
                assert float(cell.value) == pytest.approx(float(changes["value"].mean()))
            if kind in ("discrete", "values"):
                switched = now.argmax(-1).ne(whole.argmax(-1)).double()
                torch.testing.assert_close(changes["changed"], switched)
                assert float(cell.changed) == pytest.approx(float(switched.mean()))
    measure = {"deterministic": "moved", "values": "changed", "critic": "value"}.get(kind, "kl")
    assert table.ranked == measure
    sizes = [cell.size for cell in table]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(float(table.changes[measure].abs().mean(-1).max()))
    assert [cell.unit for cell in table.ranking(measure)] == [cell.unit for cell in table]


class Spread(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, 0.5)


def critic(net: nn.Module) -> TensorDictModule:
    return TensorDictModule(net, ["seen"], ["state_value"])


def test_resampled_units_are_those_of_another_state_the_same_for_one_seed() -> None:
    net, data = layers(1), states()
    first, again, other = (ablate_units(critic(net), data, "module.1", by="resample", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.changes["value"], again.changes["value"])
    assert not torch.equal(first.changes["value"], other.changes["value"])
    x, whole = data["seen"], net(data["seen"]).detach()
    found = set()
    for row in range(STATES):
        fits = [
            one
            for one in range(STATES)
            if all(
                torch.allclose(
                    first.changes["value"][unit, row],
                    (without(net, x, [unit], "", torch.full((STATES,), one)) - whole)[row],
                )
                for unit in range(6)
            )
        ]
        assert len(fits) == 1
        assert fits[0] != row
        found.add(fits[0])
    assert len(found) == STATES  # each state lends its own once


def test_a_metric_ranks_and_groups_and_left_out_states_are_counted() -> None:
    net, data = layers(1), states(3, 4)
    data["seen"][0, 0, 0] = torch.nan
    data["episode"] = torch.arange(3)[:, None].expand(3, 4)
    table = ablate_units(critic(net), data, "module.1", metric=lambda out: -2 * out["state_value"], groups="episode")
    assert table.ranked == "metric"
    assert table[0].metric.groups == 3
    assert table.changes["metric"].shape == (6, 12)
    assert table.changes["metric"][:, 0].isnan().all()
    torch.testing.assert_close(table.changes["metric"][:, 1:], -2 * table.changes["value"][:, 1:])
    assert "1 of 12 states left out" in str(table)
    assert set(table.frame()) >= {"site", "unit", "metric", "metric_low", "value"}
    alone = ablate_units(critic(net), data[1, 1], "module.1")
    assert not alone[0].value.known
    assert "one group only" in alone[0].value.words


@pytest.mark.parametrize("by", ["zero", "resample"])
def test_returns_are_of_the_same_episodes(by: str) -> None:
    trained = load("cue_corners", 0)
    actor = trained.agent.actor
    env = CueCorners(batch_size=[16])
    data = env.rollout(5, actor, break_when_any_done=False)
    options: dict[str, Any] = {"env": env, "episodes": 32, "max_steps": 20, "by": by}
    state = torch.get_rng_state()
    whole = ablate_units(actor, data, FC2, parts={FC2: 1}, **options)
    again = ablate_units(actor, data, FC2, parts={FC2: 1}, **options)
    assert torch.equal(state, torch.get_rng_state())
    # Without its second layer the agent does not know where to go; the same seeds give the same episodes.
    assert float(whole[0].returned) < -0.3
    assert str(whole[0].returned) == str(again[0].returned)
    few = ablate_units(actor, data, FC2, most=2, **options)
    assert [cell.returned is not None for cell in few] == [True, True] + [False] * 62
    assert abs(float(few[0].returned)) < 0.3
    assert few.ranking("returned")[0].returned is not None
    one = ablate_units(actor, data, FC2, parts={FC2: 1}, env=CueCorners(), episodes=12, max_steps=20, by=by)
    assert one[0].returned.groups == 12
    assert float(one[0].returned) < 0
    assert actor is trained.agent.actor
    assert not any(child._forward_hooks for child in actor.modules())


def test_wrong_input_is_refused_in_words() -> None:
    net = layers(1)
    for options, words in (
        ({"by": "noise"}, "zero"), ({"episodes": 0}, "episodes= is"), ({"most": 0}, "most= is"),
        ({"parts": {"module.1": 4}}, "divides the 6 units"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=words):
            ablate_units(critic(net), states(), "module.1", **options)
    with pytest.raises(InputError, match=r"puts out 'output'.*neither a decision nor a value"):
        ablate_units(net, TensorDict({"input": states()["seen"]}, STATES), "1")
    table = ablate_units(critic(net), states(), "module.1")
    with pytest.raises(InputError, match="no component"):
        table["module.1", 6]
    with pytest.raises(InputError, match="no measure 'kl'"):
        table.ranking("kl")
    assert math.isfinite(table[0].size)
