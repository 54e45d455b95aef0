"""Patching, activation addition, ablation and clamping of directions: exact identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torchrl.modules import ConsistentDropoutModule, ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationAddition, ActivationPatching, DirectionalAblation, DirectionClamping
from tests.policies import CASES, FEATURES, HIDDEN, mlp

F64 = torch.float64


def pair(*batch: int) -> TensorDict:
    shape = (*batch, FEATURES)
    return TensorDict({"input": torch.randn(shape), ("patched", "input"): torch.randn(shape)}, batch_size=batch)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
def test_a_full_patch_reproduces_the_first_run_as_none_does(batch: tuple[int, ...]) -> None:
    net = mlp()
    data = pair(*batch)
    with ActivationPatching(["1"]).prepare(net) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["output"], net(data["input"]))
    assert torch.equal(found["patched", "output"], found["output"])
    with ActivationPatching(["1"], patch_fn=lambda path, here, first: None).prepare(net) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["patched", "output"], found["output"])
    with ActivationPatching(["1"], patch_fn=lambda path, here, first: here).prepare(net) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["patched", "output"], net(data["patched", "input"]))


def test_a_partial_patch_by_function() -> None:
    net = mlp().double()
    data = pair(6).double()

    def first_half(path, here, first):
        return torch.cat([first[..., :8], here[..., 8:]], -1)

    with ActivationPatching(["1"], patch_fn=first_half).prepare(net) as hooked:
        found = hooked(data.clone())
    mixed = torch.cat([net[:2](data["input"])[:, :8], net[:2](data["patched", "input"])[:, 8:]], -1)
    torch.testing.assert_close(found["patched", "output"], net[2:](mixed))


def test_patching_a_policy_flips_its_decision_with_the_cue() -> None:
    actor, env = make_actor(), CueCorners()
    off, on = env.paired_states(0)
    data = off.copy().set(("patched", "observation"), on["observation"])
    with Compose(ActivationPatching([FC2]), ActivationCaching(FC2)).prepare(actor) as hooked:
        state = torch.get_rng_state()
        found = hooked(data)
        assert "action" not in found["patched"].keys()
        assert torch.equal(found["patched", "logits"], found["logits"])
        torch.set_rng_state(state)
        assert torch.equal(actor(off.copy())["action"], found["action"])
        again = hooked.annotate(
            actor(data.exclude("patched", "cache", "computed")).set("patched", data["patched"].select("observation"))
        )
        torch.testing.assert_close(again["patched", "logits"], found["patched", "logits"])


def test_bad_patches_are_refused() -> None:
    net = mlp()
    with ActivationPatching(["1"]).prepare(net) as hooked:
        with pytest.raises(MissingKeyError, match=r"\('patched', 'input'\), which the data lacks"):
            hooked(pair(3).exclude("patched"))
        with pytest.raises(InputError, match="has shape"):
            hooked(pair(3).exclude("patched").set(("patched", "input"), torch.zeros(3, 2)))
    with ActivationPatching(["1"], patch_fn=lambda *_: torch.zeros(1)).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"must have shape \(3, 16\), got \(1,\)"):
            hooked(pair(3))
        assert hooked._hooked.runtime.explaining is None
    with pytest.raises(SiteError, match="nearest"):
        ActivationPatching(["9"]).prepare(net).__enter__()


def test_the_steering_snippet_of_the_seed() -> None:
    net, scale = mlp(), 2.0
    x, pos, neg = torch.randn(4, FEATURES), torch.randn(7, FEATURES), torch.randn(3, FEATURES)
    with ActivationAddition(["1"]).prepare(net) as hooked:
        steer = hooked(TensorDict({("positive", "input"): pos, ("negative", "input"): neg})).get(("steer", "1"))
    expected = net[:2](pos).mean(0) - net[:2](neg).mean(0)
    torch.testing.assert_close(steer, expected)
    with SteeringVectors(modules_to_steer=["1"], steer_fn=lambda k, o: o + scale * steer).prepare(net) as hooked:
        out = hooked(TensorDict({"input": x}))
    torch.testing.assert_close(out["output"], net[2:](net[:2](x) + scale * expected))


@pytest.mark.parametrize("batch", [(5,), (3, 2)])
def test_the_vector_is_expanded_over_the_batch_beside_the_outputs(batch: tuple[int, ...]) -> None:
    case = CASES["categorical"]
    actor = case.build()
    data = case.data(*batch)
    for name in ("positive", "negative"):
        data[name, "observation"] = torch.randn(*batch, FEATURES)
    with ActivationAddition([case.site]).prepare(actor) as hooked:
        found = hooked(data)
        alone = hooked(data.select("positive", "negative"))
    net = actor.module[0].module
    means = [net[:2](data[name, "observation"]).flatten(0, -2).mean(0) for name in ("positive", "negative")]
    assert found["steer", case.site].shape == (*batch, HIDDEN)
    torch.testing.assert_close(found["steer", case.site].flatten(0, -2)[-1], means[0] - means[1])
    torch.testing.assert_close(alone["steer", case.site], found["steer", case.site])
    assert "action" in found.keys()
    assert "action" not in alone.keys()
    with Compose(ActivationAddition([case.site]), ActivationCaching(case.site)).prepare(actor) as hooked:
        chunked = hooked.annotate(actor(data), chunk_size=2)  # which does not take the mean of each chunk
    torch.testing.assert_close(chunked["steer", case.site], found["steer", case.site])
    assert chunked["cache", case.site].shape == (*batch, HIDDEN)


def test_one_sample_without_batch_size_and_bad_contrasts() -> None:
    net = mlp()
    pos, neg = torch.randn(FEATURES), torch.randn(FEATURES)
    with ActivationAddition("1").prepare(net) as hooked:
        steer = hooked(TensorDict({("positive", "input"): pos, ("negative", "input"): neg}))["steer", "1"]
        torch.testing.assert_close(steer, net[:2](pos) - net[:2](neg))
        with pytest.raises(MissingKeyError, match=r"\('negative', 'input'\)"):
            hooked(TensorDict({("positive", "input"): pos}))
        with pytest.raises(InputError, match="no row to average over"):
            hooked(TensorDict({("positive", "input"): torch.zeros(0, FEATURES), ("negative", "input"): neg}))
        assert not hooked._hooked.runtime.slots
    with Compose(ActivationAddition("1"), ActivationCaching("3")).prepare(net) as hooked:
        with pytest.raises((MissingKeyError, KeyError), match="input"):
            hooked(TensorDict({("positive", "input"): pos, ("negative", "input"): neg}))


def test_an_ablated_direction_is_gone_and_the_rest_is_kept() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 3)).double()
    x = torch.randn(5, FEATURES, dtype=F64)
    direction = torch.randn(8, dtype=F64)
    unit = direction / direction.norm()
    data = TensorDict({"input": x}, batch_size=5)
    method = Compose(DirectionalAblation({"0": direction}), ActivationCaching("0"))
    with method.prepare(net) as hooked:
        found = hooked(data.clone())["cache", "0"]
    torch.testing.assert_close(found @ unit, torch.zeros(5, dtype=F64))
    orthogonal = torch.eye(8, dtype=F64) - torch.outer(unit, unit)
    torch.testing.assert_close(found, net[0](x) @ orthogonal)
    with Compose(DirectionClamping({"0": direction}, value=2.0), ActivationCaching("0")).prepare(net) as hooked:
        clamped = hooked(data.clone())["cache", "0"]
        torch.testing.assert_close(clamped @ unit, torch.full((5,), 2.0, dtype=F64))
        torch.testing.assert_close(clamped @ orthogonal, net[0](x) @ orthogonal)
        hooked.controls["clamping.value"] = -1.0
        changed = hooked(data.clone())["cache", "0"]
        torch.testing.assert_close(changed @ unit, torch.full((5,), -1.0, dtype=F64))


def test_bad_directions_are_refused() -> None:
    net = mlp()
    with pytest.raises(InputError, match="not zero"):
        DirectionalAblation({"1": torch.zeros(HIDDEN)}).prepare(net).__enter__()
    with DirectionalAblation({"1": torch.ones(3)}).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"shape \(3,\).*\(2, 16\)"):
            hooked(TensorDict({"input": torch.randn(2, FEATURES)}, batch_size=2))


# ---------------------------------------------------------------------- channels of maps


class Row(nn.Module):
    """A forward of its own, which puts maps in a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


OF_MAPS = {"norm": [nn.LayerNorm([4, 2, 2])], "row": [nn.Flatten(2), nn.ReLU()], "unfold": [nn.Unfold(1)]}


@pytest.mark.parametrize("layers", OF_MAPS)
def test_norms_over_maps_and_maps_in_a_row_have_channels(layers: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *OF_MAPS[layers], nn.Flatten(), nn.Linear(16, 2))
    x, last, vector = torch.randn(2, 3, 2, 2), len(OF_MAPS[layers]), torch.randn(4)
    with Compose(SteeringVectors({str(last): vector}), ActivationCaching(str(last))).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, [2]))["cache", str(last)]
    plain = net[: last + 1](x)
    torch.testing.assert_close(found, plain + vector.reshape(4, *[1] * (plain.ndim - 2)))


def test_a_row_of_maps_that_nothing_tells_is_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Row(), nn.Flatten(), nn.Linear(16, 2))
    with SteeringVectors({"1": torch.ones(4)}).prepare(net) as hooked, pytest.raises(InputError, match="for channels"):
        hooked(TensorDict({"input": torch.randn(2, 3, 2, 2)}, [2]))


class Parts(TensorDictModuleBase):
    """Writes parameters into a node, which a distribution of several parts reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.in_keys = mlp(3), ["observation"]
        self.out_keys = [("params", "gear", "logits"), ("params", "push", "logits")]

    def forward(self, tensordict: TensorDict) -> TensorDict:
        found = self.net(tensordict["observation"])
        tensordict["params", "gear", "logits"] = found[..., :2]
        return tensordict.set(("params", "push", "logits"), found[..., 2:])


def several_parts() -> ProbabilisticActor:
    parts = {"gear": Categorical, "push": Bernoulli}
    return ProbabilisticActor(
        Parts(), in_keys=["params"], out_keys=["gear", "push"], distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": parts},
    )  # fmt: skip


def does_without() -> TensorDictSequential:
    more = TensorDictModule(mlp(), ["more"], ["unused"])
    last = TensorDictModule(mlp(), ["observation"], ["logits"])
    return TensorDictSequential(more, last, partial_tolerant=True)


def with_a_mask() -> TensorDictSequential:
    first = TensorDictModule(nn.Linear(FEATURES, HIDDEN), ["observation"], ["hidden"])
    drop = ConsistentDropoutModule(p=0.5, in_keys=["hidden", "mask"], out_keys=["hidden", "mask"])
    return TensorDictSequential(first, drop, TensorDictModule(nn.Linear(HIDDEN, 4), ["hidden"], ["logits"]))


@pytest.mark.parametrize(
    ("build", "site", "key"),
    [
        (several_parts, "module.0.net.1", ("params", "gear", "logits")),
        (does_without, "module.1.module.1", "logits"),
        (with_a_mask, "module.0.module", "logits"),
    ],
)
def test_second_inputs_are_what_the_policy_is_given(build: Callable[[], nn.Module], site: str, key: Any) -> None:
    # Neither what it makes itself nor what it can do without.
    policy, seen = build(), torch.randn(3, 5, FEATURES)
    data = TensorDict({"observation": seen[0], ("patched", "observation"): seen[1]}, 5)
    with ActivationPatching(site).prepare(policy) as hooked, torch.no_grad():
        found = hooked(data.clone())
    torch.testing.assert_close(found["patched"][key], found[key])
    data = TensorDict(
        {"observation": seen[0], "positive": {"observation": seen[1]}, "negative": {"observation": seen[2]}}
    )
    data.batch_size = [5]
    layers = policy.get_submodule(site.rpartition(".")[0]) if site[-1].isdigit() else policy.get_submodule(site)
    layers = layers[: int(site[-1]) + 1] if site[-1].isdigit() else layers
    with ActivationAddition(site, steer_key="vector").prepare(policy) as hooked, torch.no_grad():
        found = hooked(data)["vector", site]
    torch.testing.assert_close(found[0], (layers(seen[1]) - layers(seen[2])).mean(0).detach())
