"""Conditions and schedules of interventions in collectors and evaluation, for agents, trajectories and losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector, Evaluator, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl import Compose, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.errors import KeyCollisionError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor, make_critic
from tdhook_rl.latent import AtSteps, DirectionalAblation
from tdhook_rl.metrics import deletion_insertion
from tdhook_rl.rollout import check
from tests.policies import HIDDEN, POLICIES, categorical, mlp, recurrent
from tests.steered_by_hand import CASE, SITE, by_hand, counted, gated, replayed


def makers(count: int) -> list[Callable[[], TransformedEnv]]:
    return [partial(counted, 2, seed=seed) for seed in range(count)]


COLLECTORS = {
    "Collector": lambda policy, **options: Collector(counted(2), policy, **options),
    "to a buffer": lambda policy, **options: Collector(
        counted(2), policy, replay_buffer=ReplayBuffer(storage=LazyTensorStorage(64, ndim=2), batch_size=8), **options
    ),
    "MultiSync": lambda policy, **options: MultiSyncCollector(makers(1), policy, cat_results="stack", **options),
}


@pytest.mark.parametrize("kind", COLLECTORS)
def test_in_collectors_every_row_says_where_it_was_steered(kind: str) -> None:
    actor = make_actor()
    with Compose(gated(), Saliency()).prepare(actor) as hooked:
        collector = COLLECTORS[kind](hooked, frames_per_batch=32, total_frames=64, init_random_frames=0)
        try:
            batches = [data if data is not None else collector.replay_buffer[:] for data in collector]
        finally:
            collector.shutdown()
        for data in batches:
            torch.testing.assert_close(
                data["logits"], replayed(data, actor, torch.linspace(-1, 1, 64)), atol=1e-4, rtol=1e-4
            )
            steps = data["step_count"].squeeze(-1)
            acts = data["steered", "steering"]
            assert bool(data["computed", "steered"].all())
            assert bool(acts.any())
            assert not acts[(steps < 1) | (steps > 5)].any()
            hooked.annotate(data, on_mismatch="raise")


def test_random_frames_are_not_steered() -> None:
    with gated().prepare(make_actor()) as hooked:
        for buffers in (True, False):
            collector = Collector(
                counted(2), hooked, frames_per_batch=16, total_frames=48, init_random_frames=16, use_buffers=buffers
            )
            masks = [data["computed", "steered"].clone() for data in collector]
            collector.shutdown()
            assert not masks[0].any()
            assert bool(masks[-1].all())


def test_an_evaluator_and_a_recurrent_policy_step_by_step() -> None:
    actor = recurrent()
    state = ("next", "recurrent_state")
    vectors = {("module.0.module.0", state): torch.randn(HIDDEN), "module.0.module.1": torch.randn(4)}
    case = POLICIES["recurrent"]
    data = case.data(3, 5).set("step_count", torch.arange(5).expand(3, 5).unsqueeze(-1).clone())
    with SteeringVectors(vectors, when=AtSteps({1, 3})).prepare(actor) as hooked:
        rows, carried = [], data["recurrent_state"][:, 0]
        plain = carried.clone()
        for step in range(5):
            now = data[:, step].clone().set("recurrent_state", carried)
            found = hooked(now)
            expected = actor(data[:, step].clone().set("recurrent_state", plain))
            plain = expected["next", "recurrent_state"]
            if step in (1, 3):
                plain = plain + vectors["module.0.module.0", state]
            carried = found["next", "recurrent_state"]
            torch.testing.assert_close(carried, plain)
            rows.append(found["steered", "steering"])
        assert torch.stack(rows, 1).tolist() == [[False, True, False, True, False]] * 3
    with gated().prepare(make_actor()) as hooked:
        evaluator = Evaluator(counted(2), hooked, max_steps=6)
        try:
            metrics = evaluator.evaluate()
        finally:
            evaluator.shutdown()
        assert metrics


# ---------------------------------------------------------------------- agents, trajectories, losses


def test_agents_may_be_steered_one_by_one() -> None:
    case = POLICIES["multi_agent"]
    policy, data, vector = case.build(), case.data(4), torch.randn(3, HIDDEN)
    which = data[case.key].sum(-1) > 0
    method = SteeringVectors({case.site: vector}, when=lambda rows: rows[case.key].sum(-1) > 0)
    with Compose(method, Saliency(target=targets.entropy())).prepare(policy) as hooked:
        found = hooked(data.clone())
        hooked.annotate(found, on_mismatch="raise")
    plain = by_hand(policy, case, lambda value, spread: torch.where(which[..., None], value + vector, value), (4,))
    torch.testing.assert_close(found[case.logits], plain(data.clone())[case.logits])
    assert torch.equal(found["steered", "steering"], which)


def test_whole_trajectories_are_steered_at_their_steps() -> None:
    actor, case = recurrent(), POLICIES["recurrent"]
    data = case.data(3, 5).set("step_count", torch.arange(5).expand(3, 5).unsqueeze(-1).clone())
    vector = torch.randn(4)
    with SteeringVectors({"module.0.module.1": vector}, when=AtSteps({1, 3})).prepare(actor) as hooked:
        with set_recurrent_mode(True):
            found, plain = hooked(data.clone()), actor(data.clone())
    acts = torch.tensor([False, True, False, True, False])
    torch.testing.assert_close(found["logits"], plain["logits"] + acts[:, None] * vector)
    assert torch.equal(found["steered", "steering"], acts.expand(3, 5))
    carried = {("module.0.module.0", ("next", "recurrent_state")): torch.randn(HIDDEN)}
    with SteeringVectors(carried, when=AtSteps({1})).prepare(actor) as hooked:
        with set_recurrent_mode(True), pytest.raises(SiteError, match="call it step by step"):
            hooked(data.clone())


def test_a_loss_over_steered_data_sees_the_steered_policy() -> None:
    actor, critic = make_actor(), make_critic()
    with gated().prepare(actor) as hooked:
        with torch.no_grad():
            data = counted(4).rollout(6, hooked, break_when_any_done=False)
        loss = ClipPPOLoss(hooked, critic)
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
        found = loss(data)
        unsteered = ClipPPOLoss(actor, critic)(data)
    assert float(found["kl_approx"].abs()) < 1e-6  # the policy of the loss is the one that acted
    assert float(unsteered["kl_approx"].abs()) > 1e-4
    found["loss_objective"].backward()
    assert all(parameter.grad is not None for parameter in actor.parameters())


def test_metrics_and_the_doctor_are_of_the_policy_as_it_was_steered() -> None:
    actor, env = make_actor(), counted(4)
    steering = SteeringVectors({FC2: torch.randn(64)}, when=lambda rows: rows["step_count"] % 2 == 0)
    with Compose(steering, Saliency(target=targets.chosen_logit())).prepare(actor) as hooked:
        with torch.no_grad():
            data = env.rollout(6, hooked, break_when_any_done=False)
        assert check(hooked, env, {"postproc": hooked.annotate}).ok

        def score(data: TensorDictBase) -> Tensor:
            return deletion_insertion(hooked, data, n_steps=3, n_random=1).deletion

        score_of = score(hooked.annotate(data))
        torch.testing.assert_close(score(hooked.annotate(data).exclude("step_count")), score_of)  # the record is enough
        turned = hooked.annotate(data)
        turned["steered", "steering"] = ~turned["steered", "steering"]
        assert not torch.allclose(score(turned), score_of)


def test_several_interventions_each_say_where_they_acted() -> None:
    data, first, second = CASE.data(4), torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool()
    data["first"], data["second"] = first, second
    vectors = {SITE: torch.randn(HIDDEN)}
    both = Compose(SteeringVectors(vectors, when="first"), DirectionalAblation(vectors, when=["first", "second"]))
    with both.prepare(categorical()) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["steered", "steering"], first)
    assert torch.equal(found["steered", "ablation"], first & second)
    found["steered", "steering"].zero_()
    assert torch.equal(found["first"], first)  # the key is the data's own
    twice = Compose(SteeringVectors({SITE: "first"}, alpha="first"), SteeringVectors({SITE: "first"}, alpha="second"))
    with pytest.raises(KeyCollisionError, match=r"two methods write .*another name="):
        twice.prepare(categorical()).__enter__()


def test_a_record_of_an_earlier_call_decides_nothing() -> None:
    """Neither where the policy acts again on the same TensorDict, nor where its own forward is explained."""
    net, vector = mlp().double(), torch.randn(HIDDEN).double()
    data = TensorDict({"input": torch.randn(4, 6).double(), "t": torch.arange(4)}, batch_size=4)
    asked = []

    def even(rows: TensorDictBase) -> Tensor:
        asked.append(1)
        return rows["t"] % 2 == 0

    methods = Compose(
        SteeringVectors({"1": vector}, alpha=lambda rows: 1.0 + rows["t"], when=even),
        Saliency(when="step"),
        IntegratedGradients(baseline=0.0, n_steps=200, when="step", attribution_key="path"),
    )
    for first in (0, 1):
        with methods.prepare(net) as hooked:
            for start in (first, 1 - first, first):
                data["t"] = torch.arange(start, start + 4)
                asked.clear()
                data = hooked(data)
                assert len(asked) == 1
                strength = torch.where(data["t"] % 2 == 0, 1.0 + data["t"], 0)[:, None]
                point, blank = data["input"].clone().requires_grad_(), torch.zeros(4, 6).double()
                outputs = [net[2:](net[:2](x) + strength * vector).sum(-1) for x in (point, blank)]
                torch.testing.assert_close(data["output"].sum(-1), outputs[0])
                torch.testing.assert_close(data["attr", "input"], torch.autograd.grad(outputs[0].sum(), point)[0])
                change = (outputs[0] - outputs[1]).detach()
                torch.testing.assert_close(data["path", "input"].sum(-1), change, atol=1e-3, rtol=1e-3)


def test_paths_and_perturbations_keep_what_was_decided_for_the_row() -> None:
    net, vector = mlp().double(), torch.randn(HIDDEN).double()
    data = TensorDict({"input": torch.randn(6, 6).double()}, batch_size=6)
    acts = data["input"].sum(-1) > 0
    method = Compose(
        SteeringVectors({"1": vector}, when=lambda rows: rows["input"].sum(-1) > 0),
        IntegratedGradients(baseline=0.0, n_steps=200, attribution_key="path"),
        Occlusion(attribution_key="occlusion"),
    )
    with method.prepare(net) as hooked:
        recorded, unrecorded = hooked.annotate(hooked(data.clone())), hooked.annotate(data)
    outputs = [
        net[2:](net[:2](x) + acts[:, None] * vector).sum(-1).detach() for x in (data["input"], data["input"] * 0)
    ]
    gone = [
        net[2:](net[:2](data["input"].index_fill(1, torch.tensor([one]), 0)) + acts[:, None] * vector).sum(-1).detach()
        for one in range(6)
    ]
    for found in (recorded, unrecorded):
        torch.testing.assert_close(found["path", "input"].sum(-1), outputs[0] - outputs[1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found["occlusion", "input"], outputs[0][:, None] - torch.stack(gone, -1))
