"""On every device that there is: half precision, generators, and collectors that live there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tests.policies import CASES, HIDDEN

cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
devices = pytest.mark.parametrize("device", ["cpu", cuda])

FRAMES, ENVS = 64, 4


def explained(site: str, features: int) -> Compose:
    return Compose(
        ActivationCaching(site),
        SteeringVectors({site: torch.ones(features)}, alpha=0.0),
        Saliency(when="step"),
        IntegratedGradients(baseline=0.0, n_steps=3, when="step", attribution_key="path"),
    )


@devices
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", ["categorical", "value"])
def test_half_precision_acts_as_without_us(name: str, precision: str, device: str) -> None:
    case = CASES[name]
    policy, data = case.build().to(device), case.data(5).to(device)
    exact, expected = copy.deepcopy(policy), data.clone()
    within: AbstractContextManager = nullcontext()
    if precision == "autocast":
        within = torch.autocast(device, torch.bfloat16)
    else:
        dtype = getattr(torch, precision)
        policy = policy.to(dtype)
        data = data.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    with within, explained(case.site, HIDDEN).prepare(policy) as hooked:
        torch.manual_seed(0)
        plain = policy(data.clone())
        torch.manual_seed(0)
        found = hooked(data.clone())
        for key in plain.keys(True, True):
            assert torch.equal(found[key], plain[key]), key
        again = hooked.annotate(found.exclude("attr", "path", "cache", "computed"))
    with explained(case.site, HIDDEN).prepare(exact) as hooked:
        if name != "value":
            expected["action"] = found["action"]
        reference = hooked.annotate(hooked(expected) if name == "value" else expected, on_mismatch="ignore")
    for key in (("attr", case.key), ("path", case.key)):
        assert torch.equal(again[key], found[key]), key
        scale = float(reference[key].abs().max())
        torch.testing.assert_close(found[key].to(reference[key].dtype), reference[key], rtol=0.1, atol=0.1 * scale)


def trained(device: str, hooked: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two batches of PPO on a device: the actions and all weights, and where the device's generator ends."""
    torch.manual_seed(0)
    actor, critic = make_actor().to(device), make_critic().to(device)
    ppo = PPO(actor, critic, epochs=1, minibatch=32)
    context = explained(FC2, 64).prepare(actor) if hooked else nullcontext(actor)
    seen = []
    with context as policy:
        collector = Collector(
            CueCorners(batch_size=[ENVS], seed=0, device=device), policy, frames_per_batch=FRAMES,
            total_frames=2 * FRAMES, device=device, auto_register_policy_transforms=False,
        )  # fmt: skip
        for data in collector:
            seen.append(data["action"].cpu())
            ppo.update(data)
        collector.shutdown()
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    return [*seen, *(one.detach().cpu() for one in (*actor.parameters(), *critic.parameters()))], state


@devices
def test_training_there_is_the_same_to_the_bit(device: str) -> None:
    (plain, before), (hooked, after) = trained(device, False), trained(device, True)
    assert torch.equal(before, after), "the generator of the device"
    for one, other in zip(plain, hooked, strict=True):
        assert torch.equal(one, other)


@devices
@pytest.mark.parametrize("storing", ["cpu", None])
def test_results_are_stored_where_the_collector_stores(storing: str | None, device: str) -> None:
    torch.manual_seed(0)
    actor = make_actor().to(device)
    with explained(FC2, 64).prepare(actor) as policy:
        for data in collected(policy, device, storing):
            where = storing or device
            assert all(value.device.type == where for value in data.values(True, True))
            again = policy.annotate(data.exclude("attr", "path", "cache", "computed").to(device))
            for key in (("cache", FC2), ("attr", "observation"), ("path", "observation")):
                torch.testing.assert_close(again[key].to(where), data[key], atol=1e-5, rtol=1e-4)


def collected(policy: nn.Module, device: str, storing: str | None) -> Iterator[TensorDict]:
    collector = Collector(
        CueCorners(batch_size=[ENVS], seed=0, device=device), policy, frames_per_batch=FRAMES, total_frames=FRAMES,
        device=device, storing_device=storing or device, auto_register_policy_transforms=False,
    )  # fmt: skip
    yield from collector
    collector.shutdown()
