"""The doctor on the policy as it stands: one broken set-up for each finding."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import EGreedyModule, GRUModule, ProbabilisticActor, QValueActor
from torchrl.modules.utils import get_env_transforms_from_module

from tdhook_rl import ActivationCaching, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import check
from tdhook_rl.weights import Pruning
from tests.doctor_set_ups import FEATURES, Acting, Greedy, env, found, hooked


def test_a_policy_whose_context_has_ended() -> None:
    with ActivationCaching(FC2).prepare(make_actor()) as policy:
        pass
    report = check(policy, env())
    assert "context has ended" in found(report, "active", "error").seen
    assert len(report.findings) == 1


def test_an_original_that_was_untied() -> None:
    actor = make_actor()
    policy = hooked(actor)
    actor.load_state_dict({key: value.clone() for key, value in actor.state_dict().items()}, assign=True)
    one = found(check(policy, env()), "tie", "error")
    assert "module.0.module.0.weight" in one.seen
    assert "prepare the policy again" in one.remedy


def test_a_hooked_policy_with_tensors_of_its_own() -> None:
    actor = make_actor()
    policy = hooked(actor)
    policy.module[0].module[2].bias = nn.Parameter(torch.zeros(64))
    assert "module.0.module.2.bias" in found(check(policy, env()), "tie", "error").seen


def test_a_copy_of_a_hooked_policy() -> None:
    assert "weights of its own" in found(check(copy.deepcopy(hooked(make_actor())), env()), "tie", "warning").seen


def test_edited_weights_that_are_outdated() -> None:
    actor = make_actor()
    with Pruning(amount_to_prune=0.5).prepare(actor) as policy:
        assert found(check(policy, env()), "tie", "ok")
        with torch.no_grad():
            actor.module[0].module[0].weight.add_(1.0)
        assert "edited copy" in found(check(policy, env()), "tie", "warning").seen


def test_modes_that_differ() -> None:
    actor = make_actor()
    policy = hooked(actor)
    actor.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "in eval mode" in found(check(policy, env()), "modes", "warning").seen


def test_hooks_on_the_original() -> None:
    actor = make_actor()
    policy = hooked(actor)
    actor.module[0].module[1].register_forward_hook(lambda *_: None)
    one = found(check(policy, env()), "original", "warning")
    assert "<lambda>" in one.seen
    assert "module.0.module.1" in one.seen
    actor.module[0].module[3].register_forward_hook(next(iter(policy.module[0].module[3]._forward_hooks.values())))
    assert "module.0.module.3" in found(check(policy, env()), "original", "error").seen


@pytest.mark.parametrize("side", ["user's", "hooked"])
def test_weights_that_would_not_sync(side: str) -> None:
    actor = make_actor()
    policy = hooked(actor)
    (actor if side == "hooked" else policy).register_buffer("late", torch.zeros(1))
    assert f"'late' is not in the {side} policy" in found(check(policy, env()), "weights", "error").seen


def test_a_plain_module_has_other_keys_than_its_policy() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 4), Greedy())
    policy = ActivationCaching("0").prepare(net, ["observation"], ["action"], return_context=False)
    report = check(policy, env())
    assert report.ok, str(report)
    assert "prefix 'module.'" in found(report, "weights", "warning").seen


def test_a_policy_that_does_not_copy() -> None:
    policy = hooked(make_actor())
    policy.lock = threading.Lock()
    report = check(policy, env())
    assert "cannot pickle" in found(report, "deepcopy", "error").seen
    assert "nothing was run" in found(report, "dry run", "warning").seen


class Rebuilt(TensorDictModule):
    def __deepcopy__(self, memo: dict) -> Rebuilt:
        return Rebuilt(nn.Identity(), in_keys=["observation"], out_keys=["action"])


def test_a_copy_that_is_no_longer_hooked() -> None:
    policy = hooked(Rebuilt(nn.Identity(), in_keys=["observation"], out_keys=["action"]), ActivationCaching("module"))
    assert "result_keys" in found(check(policy, env()), "deepcopy", "error").seen


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}])
def test_a_policy_that_does_not_pickle(options: dict) -> None:
    class Local(nn.Linear):
        pass

    net = TensorDictModule(Local(FEATURES, 4), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    options = options and options | {"device": "cuda:99"}  # the workers themselves are not wanted here
    one = found(
        check(hooked(actor, ActivationCaching("module.0.module")), env(), options),
        "pickle",
        "error" if options else "warning",
    )
    assert "Local" in one.seen
    assert "policy_factory" in one.remedy


def test_a_factory_that_does_not_travel() -> None:
    lock = threading.Lock()

    def factory() -> Any:
        assert lock
        return hooked(make_actor())

    assert "policy_factory" in found(check(factory, env()), "pickle", "error").seen


def test_private_names() -> None:
    policy = Acting(lambda step, data: data.set("_mine", data["logits"]), out_keys=("_mine",))
    one = found(check(hooked(policy, ActivationCaching("module")), env()), "names", "warning")
    assert "_mine" in one.seen


def recurrent(**options: Any) -> ProbabilisticActor:
    gru = GRUModule(input_size=FEATURES, hidden_size=8, in_key="observation", out_key="hidden", **options)
    head = TensorDictModule(nn.Linear(8, 4), in_keys=["hidden"], out_keys=["logits"])
    return ProbabilisticActor(TensorDictSequential(gru, head), in_keys=["logits"], distribution_class=Categorical)


def test_recurrent_policies_need_their_hidden_state() -> None:
    policy = hooked(recurrent(), ActivationCaching("module.0.module.1.module"), Saliency(inputs=["observation"]))
    report = check(policy, TransformedEnv(env(), InitTracker()))
    one = found(report, "inputs", "error")
    assert "'recurrent_state'" in one.seen
    assert "TensorDictPrimer" in one.remedy
    assert found(report, "collector", "warning")
    errors = [one for one in check(policy, env()).findings if one.check == "inputs"]
    assert [one.level for one in errors] == ["error", "error"]
    assert "InitTracker" in errors[1].remedy
    for source, options in (
        (TransformedEnv(env(), get_env_transforms_from_module(policy)), {}),
        (env(), {"auto_register_policy_transforms": True}),
    ):
        report = check(policy, source, options | {"postproc": policy.annotate})
        assert report.ok, str(report)
        assert not report.of_level("warning"), str(report)


def test_recurrent_mode() -> None:
    policy = hooked(recurrent(default_recurrent_mode=True), ActivationCaching("module.0.module.1.module"))
    assert "whole trajectories" in found(check(policy, env()), "recurrent", "error").seen


def test_exploration_is_named() -> None:
    spec = CueCorners().action_spec
    actor = QValueActor(nn.Linear(FEATURES, 4), in_keys=["observation"], spec=spec)
    policy = hooked(
        TensorDictSequential(actor, EGreedyModule(spec=spec)), ActivationCaching("module.0.module.0.module")
    )
    report = check(policy, env())
    assert report.ok, str(report)
    assert "EGreedyModule at 'module.1'" in found(report, "exploration", "ok").seen
