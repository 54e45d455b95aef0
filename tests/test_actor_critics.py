"""Actors and critics that share modules: what is hooked in one operator, and operators got from a hooked one."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.errors import InactiveError, SiteError
from tests.policies import FEATURES, HIDDEN, categorical
from tests.test_invariants import hook_count
from tests.zoo import ZOO
from tests.zoo_policies import actor_critic, actor_value, critic

TRUNK = "module.0.module"


def observations(*batch: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*batch, FEATURES), "alpha": torch.rand(*batch)}, batch_size=batch)


def test_a_hooked_operator_leaves_the_other_operators_of_its_trunk_alone() -> None:
    both = actor_value()
    actor, value = both.get_policy_operator(), both.get_value_operator()
    data = observations(4)
    expected = value(data.clone())["state_value"]
    with SteeringVectors({TRUNK: torch.randn(HIDDEN)}).prepare(actor) as hooked:
        logits = hooked(data.clone())["logits"]
        assert not torch.equal(logits, actor(data.clone())["logits"])
        assert torch.equal(value(data.clone())["state_value"], expected)
        assert hook_count(both) == hook_count(actor) == hook_count(value) == 0


@pytest.mark.parametrize("build", [actor_value, actor_critic])
@pytest.mark.parametrize("alpha", [1.0, "alpha"])
def test_operators_of_a_hooked_one_are_steered_and_record_nothing(build, alpha) -> None:
    plain, data, vector = build(), observations(4), torch.randn(HIDDEN)
    method = Compose(ActivationCaching(TRUNK), SteeringVectors({TRUNK: vector}, alpha=alpha), Saliency(when="step"))
    strength = data["alpha"].unsqueeze(-1) if alpha == "alpha" else 1.0
    hidden = plain.module[0].module(data["observation"]) + strength * vector
    logits = plain.module[1].module[0].module(hidden)
    with method.prepare(plain) as hooked:
        policy = hooked.get_policy_operator()
        found = policy(data.clone())
        torch.testing.assert_close(found["logits"], logits)
        assert not {"cache", "attr", "computed"} & set(found.keys())
        dist = policy.get_dist(data.clone())
        torch.testing.assert_close(dist.logits, logits.log_softmax(-1))
        if build is actor_value:
            value = hooked.get_value_operator()(data.clone())["state_value"]
            torch.testing.assert_close(value, plain.module[2].module(hidden))
        else:
            assert hooked.get_critic_operator() is hooked
        runtime = hooked._hooked.runtime
        assert not runtime.slots
        assert not runtime.rows
    with pytest.raises(InactiveError):
        policy(data.clone())


def test_a_site_of_the_other_head_does_not_run() -> None:
    with ActivationCaching("module.2.module").prepare(actor_value()) as hooked:
        hooked(observations(2))
    policy = actor_value().get_policy_operator()
    with pytest.raises(SiteError, match=r"matches 'module\.2\.module'|did not run"):
        with ActivationCaching("module.2.module").prepare(policy) as hooked:
            hooked(observations(2))


def test_a_hooked_critic_inside_a_policy_writes_beside_the_action() -> None:
    actor, value = categorical(), critic()
    method = Compose(ActivationCaching("module.1"), Saliency(target=targets.state_value(), when="step"))
    with method.prepare(value) as hooked:
        policy = TensorDictSequential(actor, hooked)
        assert {("cache", "module.1"), ("attr", "observation")} <= set(policy.out_keys)
        collector = Collector(ZOO["categorical"].env(actor, 3), policy, frames_per_batch=15, total_frames=30)
        for data in collector:
            rows = data.reshape(-1)
            x = rows["observation"].clone().requires_grad_()
            expected = torch.autograd.grad(value.module(x).sum(), x)[0]
            torch.testing.assert_close(rows["attr", "observation"], expected)
            torch.testing.assert_close(rows["cache", "module.1"], value.module[:2](x).detach())
        collector.shutdown()


def test_both_heads_of_one_pass_are_explained() -> None:
    plain = actor_value()
    data = observations(5)
    both = {"action": targets.taken_action_log_prob(), "value": targets.state_value()}
    with Saliency(target=both, when="step").prepare(plain) as hooked:
        found = hooked(data)
    x = data["observation"].clone().requires_grad_()
    hidden = plain.module[0].module(x)
    log_prob = nn.functional.log_softmax(plain.module[1].module[0].module(hidden), -1)
    taken = log_prob.gather(-1, found["action"].unsqueeze(-1)).sum()
    (expected,) = torch.autograd.grad(taken, x, retain_graph=True)
    torch.testing.assert_close(found["attr", "action", "observation"], expected)
    (expected,) = torch.autograd.grad(plain.module[2].module(hidden).sum(), x)
    torch.testing.assert_close(found["attr", "value", "observation"], expected)
