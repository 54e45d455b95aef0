"""The hooked policy where TorchRL policies run: rollouts, collectors, weight sync, losses."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor, make_critic

PROBE = LinearProbe(weight=torch.randn(2, 64), bias=torch.zeros(2), path=FC2)


def everything(alpha: float = 0.0) -> Compose:
    return Compose(
        ActivationCaching(FC2),
        Saliency(target=targets.taken_action_log_prob()),
        Saliency(when="step", attribution_key="live"),
        ProbeReadout({"x": PROBE}),
        SteeringVectors({FC2: torch.ones(64)}, alpha=alpha),
        SteeringVectors(modules_to_steer=[FC2], steer_fn=lambda k, o: o * 1.0),
    )


def check(data: TensorDict, actor: nn.Module, alpha: float = 0.0) -> None:
    """Every result equals what the network computes from the observations of its own row."""
    net = actor.module[0].module
    with torch.no_grad():
        hidden = net[:4](data["observation"])
        torch.testing.assert_close(data["cache", FC2], hidden)
        torch.testing.assert_close(data["logits"], net[4:](hidden + alpha))
    torch.testing.assert_close(data["probe", "x"], PROBE.probabilities(hidden))
    torch.testing.assert_close(data["live", "observation"], data["attr", "observation"], rtol=1e-4, atol=1e-6)
    for root in ("cache", "attr", "live", "probe"):
        assert bool(data["computed", root].all())


def nudge(actor: nn.Module) -> None:
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("batch_size", [(), (4,)])
def test_collector_values_change_and_are_never_stale(batch_size: tuple[int, ...]) -> None:
    actor = make_actor()
    with everything().prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=batch_size, max_steps=4, seed=0),
            policy,
            frames_per_batch=64,
            total_frames=256,
            postproc=policy.annotate,
            auto_register_policy_transforms=False,
        )
        batches = []
        for data in collector:
            check(data, actor)
            batches.append(data)
            nudge(actor)
        collector.shutdown()
    assert bool(batches[0]["next", "done"].any())  # the rows compared go across the ends of episodes
    assert not torch.equal(batches[0]["cache", FC2], batches[2]["cache", FC2])


def test_a_seeded_collection_equals_the_plain_one() -> None:
    actor = make_actor()
    observing = Compose(
        ActivationCaching(FC2),
        Saliency(when="step"),
        ProbeReadout({"x": PROBE}),
        SteeringVectors({FC2: torch.ones(64)}, alpha=0.0),
    )

    def collect(policy: nn.Module, **options) -> tuple[TensorDict, torch.Tensor]:
        torch.manual_seed(5)
        collector = Collector(
            CueCorners(batch_size=[3], seed=1),
            policy,
            frames_per_batch=60,
            total_frames=120,
            auto_register_policy_transforms=False,
            **options,
        )
        data = torch.cat(list(collector), 1)
        collector.shutdown()
        return data, torch.get_rng_state()

    expected, state = collect(actor)
    with observing.prepare(actor) as policy:
        found, state_after = collect(policy, postproc=policy.annotate)
    assert torch.equal(state, state_after)
    for key in expected.keys(True, True):
        assert torch.equal(expected[key], found[key]), key


def test_env_rollout_keeps_no_graph_in_the_results() -> None:
    actor = make_actor()
    with Compose(ActivationCaching(FC2), Saliency(when="step")).prepare(actor) as policy:
        data = CueCorners(batch_size=[2], seed=0).rollout(6, policy, break_when_any_done=False)
    assert data["cache", FC2].shape == (2, 6, 64)
    assert not data["cache", FC2].requires_grad
    assert not data["attr", "observation"].requires_grad


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    "devices",
    [{"device": "cpu"}, {"policy_device": "cpu"}, {"policy_device": "cpu:0", "env_device": "cpu"}],
    ids=["device", "policy_device", "cast"],
)
def test_collectors_that_are_told_devices(devices: dict, buffered: bool) -> None:
    actor = make_actor()
    options = {"replay_buffer": ReplayBuffer(storage=LazyTensorStorage(64))} if buffered else {}
    with everything().prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[2], max_steps=4, seed=0),
            policy,
            frames_per_batch=32,
            total_frames=64,
            auto_register_policy_transforms=False,
            **options,
            **devices,
        )
        for data in collector:
            found = options["replay_buffer"][:] if buffered else data
            check(policy.annotate(found.reshape(-1)), actor)
        collector.shutdown()


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_results_reach_a_replay_buffer(storage) -> None:
    actor = make_actor()
    buffer = ReplayBuffer(storage=storage(256), batch_size=32)
    with everything().prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            frames_per_batch=64,
            total_frames=128,
            replay_buffer=buffer,
            auto_register_policy_transforms=False,
        )
        for _ in collector:
            pass
        collector.shutdown()
        data = buffer[:].reshape(-1)
        assert set(policy._step_keys()) <= set(data.keys(True, True))
        check(policy.annotate(data), actor)


def test_losses_on_the_plain_actor_see_no_hook() -> None:
    actor, critic = make_actor(), make_critic()

    def losses(data: TensorDict) -> TensorDict:
        data = data.clone()
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
        return ClipPPOLoss(actor, critic)(data.reshape(-1))

    torch.manual_seed(3)
    data = CueCorners(batch_size=[4], seed=0).rollout(8, actor, break_when_any_done=False).detach()
    expected = losses(data)
    with everything(alpha=3.0).prepare(actor) as policy, ActivationCaching("module.1").prepare(critic):
        policy(data.select("observation"))
        found = losses(data)
        copy.deepcopy(ClipPPOLoss(actor, critic))
        assert not policy._hooked.runtime.slots
    for key in expected.keys():
        assert torch.equal(expected[key], found[key]), key


def test_a_loss_on_the_hooked_policy_is_steered_and_records_nothing() -> None:
    actor, critic = make_actor(), make_critic()
    data = CueCorners(batch_size=[4], seed=0).rollout(8, actor, break_when_any_done=False).detach()
    GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
    method = Compose(ActivationCaching(FC2), SteeringVectors({FC2: torch.randn(64)}, alpha=1.0))
    with method.prepare(actor) as policy:
        loss = ClipPPOLoss(policy, critic)
        assert [name for name, _ in loss.named_parameters()] == [
            name for name, _ in ClipPPOLoss(actor, critic).named_parameters()
        ]
        found = loss(data.reshape(-1).clone())
        assert abs(float(found["kl_approx"])) > 1e-3  # the data came from the unsteered policy
        assert not policy._hooked.runtime.slots
        copy.deepcopy(loss)


def test_value_estimators_accept_a_hooked_critic() -> None:
    critic = make_critic()
    data = CueCorners(batch_size=[4], seed=0).rollout(8, break_when_any_done=False)
    expected = GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data.clone())["advantage"]
    with ActivationCaching("module.1").prepare(critic) as hooked:
        found = GAE(gamma=0.9, lmbda=0.9, value_network=hooked)(data.clone())["advantage"]
        torch.testing.assert_close(found, expected)
        hooked(data.clone())
        pickled = copy.deepcopy(hooked)
    assert pickled(data.clone())["cache", "module.1"].shape == (4, 8, 64)


def test_random_frames_at_the_start_are_marked_as_not_computed() -> None:
    actor = make_actor()
    with ActivationCaching(FC2).prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[2], seed=0),
            policy,
            frames_per_batch=16,
            total_frames=48,
            init_random_frames=16,
            auto_register_policy_transforms=False,
        )
        first, second, _ = (data.clone() for data in collector)
        collector.shutdown()
        assert not bool(first["computed", "cache"].any())
        assert bool(second["computed", "cache"].all())
        assert bool(policy.annotate(first)["computed", "cache"].all())
