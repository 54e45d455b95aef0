"""Every method on networks that it may stumble over: in-place activations, batch statistics, bytes, nested keys,
tuples, and hidden states, none of which may be mixed, moved or overwritten."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import set_recurrent_mode

from tdhook_rl import ActivationCaching, Compose, SteeringVectors
from tdhook_rl.errors import InputError
from tests.method_table import SAMPLES, pairs
from tests.policies import ACTIONS, CASES, ODD, Pair
from tests.test_invariants import assert_at_rest, snapshot

# Batch statistics decide while a policy trains, the running ones explain it: a difference that may be warned of.
pytestmark = pytest.mark.filterwarnings("ignore:the stored .* is not what the policy computes now:UserWarning")


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore:.*moved together")
@pytest.mark.parametrize("name", [name for name, policy in pairs(ODD, observes=True) if policy == "batch_norm"])
def test_statistics_move_once_by_the_policys_own_forward(name: str) -> None:
    case, sample = ODD["batch_norm"], SAMPLES[name]
    plain, data = case.build(), sample.data(case, 5)
    twin = copy.deepcopy(plain)
    torch.manual_seed(7)
    expected, state = twin(data.clone()), torch.get_rng_state()
    with sample.make(case).prepare(plain) as hooked:
        torch.manual_seed(7)
        found = hooked(data.clone())
        assert torch.equal(torch.get_rng_state(), state)
        for key in expected.keys(True, True):
            assert torch.equal(found[key], expected[key]), key
        hooked.annotate(found)
        assert_at_rest(hooked)
    assert_same(buffers(plain), buffers(twin))


def twin_of(policy: str, plain: nn.Module) -> nn.Module:
    """The same network without what is odd about it."""
    twin = copy.deepcopy(plain)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, Pair):
            module.alone = True
    return twin.eval() if policy == "batch_norm" else twin


def plainly(data: TensorDict) -> TensorDict:
    """The same numbers, as floats."""
    return data.apply(lambda value: value.float() if value.dtype == torch.uint8 else value)


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        pair
        for pair in pairs({name: ODD[name] for name in ("inplace_relu", "batch_norm", "bytes", "tuples")}, by_row=True)
        if pair != ("ActivationPatching", "tuples")  # all of a tuple is patched, of which the twin returns a part
    ],
)
def test_the_results_are_those_of_a_plain_twin(method: str, policy: str) -> None:
    case, row = ODD[policy], SAMPLES[method]
    plain = case.build()
    data = row.data(case, 5)
    collected = plain(data.clone()).detach()
    twin = twin_of(policy, plain)
    found, expected = [], []
    for model, given, stored, results in (
        (plain, data, collected, found),
        (twin, plainly(data), plainly(collected), expected),
    ):
        torch.manual_seed(3)  # for vectors that the method is made with
        with row.make(case).prepare(model) as hooked:
            if policy != "batch_norm":
                results.append(hooked(given.clone())[case.logits])
            annotated = hooked.annotate(stored)
            written = [key for key in hooked.result_keys if key in annotated.keys(True, True)]
            results += [annotated[key] for key in written if not key[-1].endswith(".stamp")]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, _ in pairs({"multi_agent": ODD["multi_agent"]}, observes=True, by_row=True)
        # Which are made for the features of all agents together, or give one number for all.
        if name not in ("Occlusion", "ProbeReadout", "IntegratedGradients delta")
    ],
)
def test_an_agent_of_several_is_explained_as_if_alone(method: str) -> None:
    case, single, row = ODD["multi_agent"], CASES["categorical"], SAMPLES[method]
    team, alone = case.build(), single.build()
    alone.load_state_dict(team.state_dict())
    data = row.data(case, 5)
    collected = team(data).detach()
    flat = TensorDict({}, batch_size=15)
    for key in collected.keys(True, True):
        if "agents" in key:
            flat[tuple(part for part in key if part != "agents")] = collected[key].flatten(0, 1)
    found, expected = [], []
    for one, model, stored, results in ((case, team, collected, found), (single, alone, flat, expected)):
        with row.make(one).prepare(model) as hooked:
            annotated = hooked.annotate(stored)
            results += [annotated[key].flatten() for key in hooked.result_keys if key[0] != "computed"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "policy"), pairs(ODD, observes=False))
def test_interventions_act_and_are_gone_afterwards(method: str, policy: str) -> None:
    case, row = ODD[policy], SAMPLES[method]
    plain = case.build()
    twin, data = copy.deepcopy(plain), row.data(case, 6)
    before = snapshot(plain)
    with row.make(case).prepare(plain) as hooked:
        found = hooked(data.clone())[case.logits]
        if policy != "batch_norm":  # which mixes rows by itself
            alone = torch.cat([hooked(data[index : index + 1].clone())[case.logits] for index in range(6)])
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
            assert snapshot(plain) == before
    expected = twin(data.clone())[case.logits]
    assert not torch.allclose(found, expected)
    assert torch.equal(plain(data.clone())[case.logits], expected)


@pytest.mark.parametrize("method", ["Saliency step", "IntegratedGradients step", "LRP", "Occlusion"])
def test_an_attribution_in_a_forward_over_trajectories_is_refused(method: str) -> None:
    case, row = ODD["recurrent"], SAMPLES[method]
    actor = case.build()
    with row.make(case).prepare(actor) as hooked, set_recurrent_mode(True):
        name = method.split()[0]
        with pytest.raises(
            InputError, match=f"^{name} explains rows, but a policy in recurrent mode reads trajectories"
        ):
            hooked(row.data(case, 3, 6))


def test_what_only_looks_at_a_forward_over_trajectories_keeps_them_apart() -> None:
    case = ODD["recurrent"]
    actor, data = case.build(), case.data(3, 6)
    vector = torch.randn(ACTIONS)
    method = Compose(SteeringVectors({case.site: vector}), ActivationCaching(case.site))
    with method.prepare(actor) as hooked, set_recurrent_mode(True):
        found = hooked(data.clone())
        alone = torch.cat([hooked(data[index : index + 1].clone())["cache", case.site] for index in range(3)])
        expected = actor(data.clone())["logits"] + vector
    torch.testing.assert_close(found["cache", case.site], alone)
    torch.testing.assert_close(found["logits"], expected)
