"""The doctor: one broken set-up for each finding, and healthy ones that it leaves alone."""

from __future__ import annotations

import copy
import functools
import io
import multiprocessing
import os
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import AsyncBatchedCollector, Collector, MultiAsyncCollector
from torchrl.collectors.distributed import RayCollector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage, ReplayBuffer
from torchrl.envs import InitTracker, SelectTransform, TransformedEnv
from torchrl.modules import EGreedyModule, GRUModule, ProbabilisticActor, QValueActor
from torchrl.modules.utils import get_env_transforms_from_module

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import CheckError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent.probing import Probing
from tdhook_rl.rollout import Finding, Report, check
from tdhook_rl.weights import Pruning
from tests.method_table import METHODS
from tests.policies import Case

FEATURES = CueCorners.observation_features
CASE = Case(make_actor, FC2, features=(64,))


class Changed(CueCorners):
    """CueCorners of which each step is changed by ``change(step, data)``; steps count from 0."""

    def __init__(self, change: Callable[[int, TensorDictBase], Any], **options: Any) -> None:
        super().__init__(batch_size=[2], seed=0, **options)
        self.change = change
        self.count = 0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        data = super()._step(tensordict)
        self.change(self.count, data)
        self.count += 1
        return data


class Acting(TensorDictModule):
    """A policy that always goes up, and whose forward may do what a policy should not."""

    def __init__(self, also: Callable[[int, TensorDictBase], Any], out_keys: tuple = ()) -> None:
        super().__init__(nn.Linear(FEATURES, 4), in_keys=["observation"], out_keys=["logits"])
        self.also = also
        self.count = 0
        self.out_keys = ["logits", "action", *out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits = self.module(tensordict["observation"])
        tensordict.update({"logits": logits, "action": torch.zeros_like(logits[..., 0], dtype=torch.long)})
        self.also(self.count, tensordict)
        self.count += 1
        return tensordict


class Greedy(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


class Overflow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign() * torch.inf


def env() -> CueCorners:
    return CueCorners(batch_size=[2], seed=0)


def found(report: Report, check: str, level: str) -> Finding:
    """The one finding of a check and a level."""
    matching = [one for one in report.findings if (one.check, one.level) == (check, level)]
    assert len(matching) == 1, str(report)
    return matching[0]


def hooked(policy: nn.Module, *methods: Any) -> Any:
    return Compose(*(methods or (ActivationCaching(FC2), Saliency()))).prepare(policy, return_context=False)


# ------------------------------------------------------------------ healthy


def test_a_healthy_set_up_is_all_ok_and_left_as_it_was() -> None:
    actor, source = make_actor(), env()
    twin = copy.deepcopy(source)
    method = Compose(ActivationCaching(FC2), Saliency(), Saliency(when="step", attribution_key="live"))
    with method.prepare(actor) as policy:
        before = [(tensor, tensor.clone(), tensor._version) for tensor in (*policy.parameters(), *policy.buffers())]
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        report = check(policy, source, {"frames_per_batch": 64, "postproc": policy.annotate})
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert random.getstate() == states[2]
        assert all(tensor._version == version and torch.equal(tensor, value) for tensor, value, version in before)
        assert not policy._hooked_runtime.slots
        assert source.reset()["observation"].equal(twin.reset()["observation"])  # and so is its generator
    assert report.ok
    report.raise_if_failed()
    assert {one.level for one in report.findings} == {"ok"}, str(report)
    assert [one.check for one in report.findings] == [
        "tie", "original", "weights", "deepcopy", "pickle", "names", "inputs", "sites", "keys", "environment keys",
        "shapes", "finite", "values", "schedules", "annotate", "devices", "collector", "kept",
    ]  # fmt: skip
    assert "('cache', 'module.0.module.3') (64,) float32" in found(report, "keys", "ok").seen
    assert "('attr', 'observation')" in found(report, "annotate", "ok").seen


@pytest.mark.parametrize("name", METHODS)
def test_no_method_alarms_it(name: str) -> None:
    actor = make_actor()
    with METHODS[name].make(CASE).prepare(actor) as policy:
        report = check(policy, env())
    assert report.ok, str(report)
    assert not report.of_level("warning"), str(report)


@pytest.mark.parametrize("source", [env, lambda: CueCorners(seed=0)], ids=["batched", "single"])
def test_constructors_contexts_and_factories(source: Callable[[], CueCorners]) -> None:
    actor = make_actor()
    context = ActivationCaching(FC2).prepare(actor)
    assert check(context, source).ok
    with context as policy:  # it was left, and can be entered
        assert check(policy, source()).ok
    made = check(lambda: hooked(make_actor()), source)
    assert made.ok, str(made)
    assert "policy_factory" in found(made, "pickle", "ok").seen
    assert "deleted" in found(made, "original", "ok").seen


def test_the_report() -> None:
    findings = (
        Finding("tie", "ok", "shared"),
        Finding("names", "warning", "word " * 40, "rename [0]"),
        Finding("keys", "error", "absent", "write it"),
    )
    report = Report(findings)
    assert not report.ok
    assert str(report).splitlines()[0] == "ok      tie    shared"
    assert "\n               -> rename [0]\n" in str(report)
    assert max(map(len, str(report).splitlines())) <= 120
    assert str(report).endswith("\n1 ok, 1 warning, 1 error")
    with pytest.raises(CheckError, match=r"found 1 error:\n  keys: absent; write it"):
        report.raise_if_failed()
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    assert "rename [0]" in console.export_text()


# ------------------------------------------------------------------ the policy as it stands


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


def test_reserved_and_private_names() -> None:
    report = check(hooked(make_actor(), ActivationCaching(FC2, cache_key="next")), env())
    assert "below 'next'" in found(report, "names", "error").seen
    report = check(hooked(make_actor(), ActivationCaching(FC2, cache_key="computed")), env())
    assert "below 'computed'" in found(report, "names", "error").seen
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
        report = check(policy, source, options)
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


# ------------------------------------------------------------------ the environment and the steps


def test_inputs_that_the_environment_does_not_give() -> None:
    net = TensorDictModule(nn.Linear(FEATURES, 4), in_keys=["pixels"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    one = found(check(hooked(actor, ActivationCaching("module.0.module")), env()), "inputs", "error")
    assert "'pixels'" in one.seen
    assert "observation" in one.remedy
    steered = hooked(make_actor(), SteeringVectors({FC2: torch.ones(64)}, alpha="alpha"))
    assert "an intervention reads it" in found(check(steered, env()), "inputs", "error").remedy


def test_results_that_collide_with_the_environment() -> None:
    policy = hooked(make_actor(), ActivationCaching(FC2, cache_key="elapsed"))
    assert "collides with ('elapsed',)" in found(check(policy, env()), "names", "error").seen


def test_sites_that_do_not_run_or_run_often() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
            self.head = nn.Linear(FEATURES, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.used(self.used(x)))

    net = TensorDictModule(Odd(), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    report = check(hooked(actor, ActivationCaching(r"module\.0\.module\.(used|unused|head)$")), env())
    sites = [(one.level, one.seen) for one in report.findings if one.check == "sites"]
    assert sites == [
        ("warning", "hooked, but not run by this forward: 'module.0.module.unused'"),
        ("warning", "run several times in one forward: 'module.0.module.used' 2 times"),
        ("ok", "run once in one forward: 'module.0.module.head'"),
    ]
    report = check(hooked(actor, ActivationCaching("module.0.module.unused")), env())
    assert "did not run in this call" in found(report, "dry run", "error").seen


def test_sites_under_vmap() -> None:
    class Members(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(FEATURES, 4)
            self.scales = nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda scale: self.one(x * scale))(self.scales).mean(0)

    net = TensorDictModule(Members(), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    report = check(hooked(actor, ActivationCaching("module.0.module.one")), env())
    assert "under vmap, with its dimension before the features" in found(report, "sites", "ok").seen


def test_keys_that_are_declared_or_written_only() -> None:
    def sometimes(step: int, data: TensorDictBase) -> None:
        if step % 3 == 0:
            data["extra"] = data["logits"].clone()

    one = found(check(hooked(Acting(sometimes, ("extra",)), ActivationCaching("module")), env()), "keys", "error")
    assert "('extra',) is declared, and was not written at step 1 (10 of 16)" in one.seen
    one = found(check(hooked(Acting(sometimes), ActivationCaching("module")), env()), "keys", "error")
    assert "writes ('extra',) (first at step 0), which is not in its out_keys" in one.seen
    policy = Acting(lambda step, data: data["observation"].add_(0.0) if step == 4 else None)
    one = found(check(hooked(policy, ActivationCaching("module")), env()), "keys", "warning")
    assert "changes its input ('observation',) in place (first at step 4)" in one.seen


def test_environment_keys_that_come_and_go() -> None:
    source = Changed(lambda step, data: data.set("late", data["reward"]) if step >= 3 else None)
    report = check(hooked(make_actor()), source)
    assert "('next', 'late') appears at step 3" in found(report, "environment keys", "error").seen
    source = Changed(lambda step, data: data.set("late", data["reward"]) if step == 5 else None)
    one = found(check(hooked(make_actor()), source), "environment keys", "error")
    assert "at step 5 and is absent at step 6" in one.seen


def test_shapes_that_change() -> None:
    policy = Acting(lambda step, data: data.set("extra", torch.zeros(2, 1 + step // 4)), ("extra",))
    one = found(check(hooked(policy, ActivationCaching("module")), env()), "shapes", "error")
    assert "('extra',) is (1,) float32 first and (2,) float32 at step 4" in one.seen
    policy = Acting(
        lambda step, data: data.set("extra", torch.zeros(2, dtype=[torch.int, torch.long][step > 6])), ("extra",)
    )
    one = found(check(hooked(policy, ActivationCaching("module")), env()), "shapes", "error")
    assert "() int32 first and () int64 at step 7" in one.seen


def test_observations_outputs_and_results_that_are_not_finite() -> None:
    def spoil(step: int, data: TensorDictBase) -> None:
        if step == 3:
            data["observation"][1, 0] = torch.nan

    report = check(hooked(Acting(lambda *_: None), ActivationCaching("module")), Changed(spoil))
    seen = [one.seen for one in report.of_level("error") if one.check == "finite"]
    assert "the environment gives NaN in ('next', 'observation') at step 3 (1 entries)" in seen
    assert any("the policy gives NaN in ('logits',) at step 4" in one for one in seen)
    net = nn.Sequential(nn.Linear(FEATURES, 4), Overflow(), nn.Hardtanh())
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    one = found(check(hooked(actor, ActivationCaching("module.0.module.1")), env()), "finite", "error")
    assert "the result ('cache', 'module.0.module.1') is not finite at step 0" in one.seen


def test_results_that_never_change() -> None:
    policy = hooked(
        make_actor(), SteeringVectors(modules_to_steer=[FC2], steer_fn=lambda k, o: o * 0 + 1), ActivationCaching(FC2)
    )
    one = found(check(policy, env()), "values", "warning")
    assert "has the same value at each of 16 steps" in one.seen


def test_a_schedule_that_never_selects_a_row() -> None:
    def after(module: nn.Module, args: tuple, output: TensorDictBase) -> None:
        output["computed", "cache"] = torch.zeros(2, dtype=torch.bool)

    policy = hooked(make_actor())
    policy.register_forward_hook(after)
    report = check(policy, env(), {"frames_per_batch": 80})
    schedules = [one.seen for one in report.of_level("error") if one.check == "schedules"]
    assert schedules == [
        "no row of 'cache' was computed in 40 steps: its mask is false throughout",
        "no row of 'cache' was computed in a batch of the collector",
    ]


def test_annotate_that_does_not_repeat_the_steps() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 32), nn.Dropout(0.5), nn.Linear(32, 4))
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    one = found(check(hooked(actor, ActivationCaching("module.0.module.1")), env()), "annotate", "warning")
    assert "('cache', 'module.0.module.1') by up to" in one.seen


def test_environments_that_cannot_be_used() -> None:
    source = env()
    source.lock = threading.Lock()
    assert "give a function that makes one" in found(check(hooked(make_actor()), source), "dry run", "error").seen
    made = check(hooked(make_actor()), lambda: "env")
    assert "returned a str" in found(made, "dry run", "error").seen

    def broken() -> CueCorners:
        raise OSError("no display")

    one = found(check(hooked(make_actor()), broken), "dry run", "error")
    assert one.seen == "the constructor of the environment: OSError: no display"


# ------------------------------------------------------------------ the collector


def test_devices() -> None:
    report = check(hooked(make_actor()), env(), {"policy_device": "cuda:99"})
    assert "'cuda:99'" in found(report, "devices", "error").seen
    assert "not tried" in found(report, "collector", "warning").seen
    net = TensorDictModule(nn.Linear(FEATURES, 4), in_keys=["observation"], out_keys=[("agent", "logits")])
    actor = ProbabilisticActor(
        net, in_keys={"logits": ("agent", "logits")}, distribution_class=Categorical, out_keys=["action"]
    )
    policy = hooked(actor, ActivationCaching("module.0.module"))
    options = {
        "policy_device": "cpu:0",
        "env_device": "cpu",
        "replay_buffer": ReplayBuffer(storage=LazyTensorStorage(99)),
    }
    one = found(check(policy, env(), options), "devices", "error")
    assert "('agent', 'logits')" in one.seen
    assert "storing_device" in one.remedy
    with pytest.raises(RuntimeError, match="devices differ"):  # which is what TorchRL would say
        list(
            Collector(
                env(), policy, frames_per_batch=8, total_frames=8, auto_register_policy_transforms=False, **options
            )
        )
    assert check(policy, env(), options | {"storing_device": "cpu"}).ok


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_a_buffer_whose_rows_lack_the_results(storage: Any) -> None:
    actor = make_actor()
    buffer = ReplayBuffer(storage=storage(100))
    options = {"frames_per_batch": 16, "replay_buffer": buffer, "auto_register_policy_transforms": False}
    policy = hooked(actor)
    assert check(policy, env(), options).ok
    for _ in Collector(env(), actor, total_frames=16, **options):
        pass
    rows = len(buffer)
    report = check(policy, env(), options)
    assert len(buffer) == rows
    if storage is LazyTensorStorage:  # it raises by itself
        assert "the first rows of a buffer fix its keys" in found(report, "dry run", "error").remedy
    else:
        one = found(report, "kept", "error")
        assert "('cache', 'module.0.module.3')" in one.seen
        assert "rows from before fixed its keys" in one.remedy


def test_other_ways_to_lose_results() -> None:
    policy = hooked(make_actor())
    buffer = functools.partial(ReplayBuffer, storage=LazyMemmapStorage(100))
    report = check(policy, env(), {"replay_buffer": buffer(), "init_random_frames": 500})
    assert "init_random_frames" in found(report, "kept", "error").remedy
    options = {"replay_buffer": buffer(), "init_random_frames": 500, "postproc": policy.annotate}
    assert check(policy, env(), options).ok
    keep = SelectTransform("observation", "action", ("next", "reward"))
    report = check(policy, env(), {"replay_buffer": buffer(transform=keep)})
    assert "transform of the buffer" in found(report, "kept", "error").remedy
    report = check(policy, env(), {"postproc": lambda data: data.exclude("cache")})
    assert "postproc" in found(report, "kept", "error").remedy


def test_random_frames() -> None:
    policy = hooked(make_actor())
    assert "masked" in found(check(policy, env(), {"init_random_frames": 100}), "random frames", "ok").seen
    report = check(policy, env(), {"init_random_frames": 100, "use_buffers": False})
    assert "lack ('cache', 'module.0.module.3')" in found(report, "random frames", "warning").seen


class Remembering:
    """A postproc that computes once."""

    def __init__(self) -> None:
        self.extra: torch.Tensor | None = None

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        self.extra = data["logits"].sum(-1) if self.extra is None else self.extra
        return data.set("extra", self.extra.clone())


def test_values_that_are_frozen_between_batches() -> None:
    postproc = Remembering()
    assert (
        "('extra',) is the same"
        in found(check(hooked(make_actor()), env(), {"postproc": postproc}), "frozen", "error").seen
    )
    assert postproc.extra is None  # a copy of it was called


def test_arguments_that_cannot_be_tried() -> None:
    postproc = Remembering()
    postproc.lock = threading.Lock()
    one = found(check(hooked(make_actor()), env(), {"postproc": postproc}), "collector", "warning")
    assert "postproc (TypeError: cannot pickle" in one.seen
    assert "not tried" in found(check(hooked(make_actor()), env(), collector=RayCollector), "collector", "warning").seen
    one = found(check(hooked(make_actor()), env(), {"frames_per_bach": 10}), "dry run", "error")
    assert "frames_per_bach" in one.seen
    assert "as it was before prepare()" in one.remedy


def test_what_is_not_to_check() -> None:
    with pytest.raises(InputError, match="not one; give what"):
        check(make_actor(), env())
    with pytest.raises(InputError, match=r"its module 'module\.0' is: prepare the outermost"):
        check(TensorDictSequential(hooked(make_actor())), env())
    with pytest.raises(InputError, match="at least two"):
        check(hooked(make_actor()), env(), steps=1)
    with pytest.raises(InputError, match="has no workers"):
        check(hooked(make_actor()), env(), {"num_workers": 2}, collector=Collector)


def test_the_users_probes_are_not_fed() -> None:
    class Probe:
        def step(self, activation: torch.Tensor) -> None:
            self.seen = activation

    probe = Probe()
    report = check(hooked(make_actor(), Probing(FC2, lambda key, direction: probe)), env())
    assert report.ok, str(report)
    assert not hasattr(probe, "seen")


# ------------------------------------------------------------------ time and workers


def test_an_environment_that_hangs() -> None:
    source = Changed(lambda step, data: time.sleep(60 if step == 2 else 0))
    began = time.monotonic()
    report = check(hooked(make_actor()), source, time_limit=1.0)
    assert time.monotonic() - began < 30
    one = found(report, "time limit", "error")
    assert one.seen == "after 1 s the check still waited for the environment at step 2"


def hanging_worker() -> CueCorners:
    time.sleep(60 if multiprocessing.parent_process() else 0)
    return env()


def test_a_worker_that_hangs_is_named_and_stopped() -> None:
    began = time.monotonic()
    report = check(hooked(make_actor()), hanging_worker, {"num_workers": 1}, time_limit=4.0)
    assert time.monotonic() - began < 40
    assert "still waited for the start of 1 worker of MultiSyncCollector" in found(report, "time limit", "error").seen
    assert not multiprocessing.active_children()


def die(step: int, data: TensorDictBase) -> None:
    if step == 2 and multiprocessing.parent_process():
        os._exit(3)


@pytest.mark.slow
def test_a_worker_that_dies_is_named() -> None:
    report = check(hooked(make_actor()), functools.partial(Changed, die), {"num_workers": 1})
    assert re.search(r"batch 0 from 1 worker .*worker 0 \(exit code 3\)", found(report, "dry run", "error").seen)
    assert not multiprocessing.active_children()


class SetsNewKey:
    def __call__(self, data: TensorDictBase) -> None:
        data.set("extra", data["logits"].sum(-1))


def test_a_hook_in_a_worker_whose_keys_are_frozen() -> None:
    report = check(hooked(make_actor()), env, {"num_workers": 1, "post_collect_hook": SetsNewKey()})
    assert found(report, "collector", "ok").seen == "MultiSyncCollector ran with 1 worker, and took weights"
    assert "('extra',) is the same in two batches" in found(report, "frozen", "error").seen
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("shared_init", [True, False])
def test_results_that_workers_add_behind_the_storage(shared_init: bool) -> None:
    policy = hooked(make_actor())
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, shared_init=shared_init), shared=True)
    report = check(policy, CueCorners, {"num_workers": 1, "postproc": policy.annotate, "replay_buffer": buffer})
    if shared_init:
        assert report.ok, str(report)
    else:
        one = found(report, "kept", "error")
        assert "('attr', 'observation')" in one.seen
        assert "shared_init=True" in one.remedy


@pytest.mark.slow
def test_multi_async() -> None:
    report = check(
        hooked(make_actor()), env(), {"num_workers": 1, "compile_policy": True}, collector=MultiAsyncCollector
    )
    assert report.ok, str(report)


def test_async_batched() -> None:
    policy, options = hooked(make_actor()), {"num_workers": 3, "env_backend": "threading"}
    report = check(policy, CueCorners, options, collector=AsyncBatchedCollector)
    assert report.ok, str(report)
    report = check(policy, env, options, collector=AsyncBatchedCollector)  # takes no batched environments
    assert "(because of " in found(report, "dry run", "error").seen


def broken_steering(module_key: str, output: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return output


def test_graphs_that_break_and_recompile() -> None:
    torch._dynamo.reset()
    actor = make_actor()
    report = check(hooked(actor), env(), {"compile_policy": True})
    assert found(report, "compile", "ok").seen == "one graph"
    assert found(report, "recompilation", "ok")
    breaking = hooked(actor, SteeringVectors(modules_to_steer=[FC2], steer_fn=broken_steering))
    one = found(check(breaking, env(), compile=True), "compile", "warning")
    assert "graph_break" in one.seen
    assert "leave out the method" in one.remedy
    options = {"compile_policy": {"fullgraph": True, "backend": "eager"}}
    assert found(check(breaking, env(), options), "compile", "error")
    policy = Acting(lambda step, data: data["logits"].add_(step))
    report = check(hooked(policy, ActivationCaching("module")), env(), compile=True)
    assert "2 more graphs" in found(report, "recompilation", "warning").seen
    policy = Acting(lambda step, data: torch._dynamo.graph_break())
    one = found(check(hooked(policy, ActivationCaching("module")), env(), compile=True), "compile", "warning")
    assert "the user's policy does not either" in one.remedy
    torch._dynamo.reset()


# ------------------------------------------------------------------ the command


def test_the_command_on_its_example(capsys) -> None:
    assert main(["check", "--steps", "8"]) == 0
    shown = capsys.readouterr().out
    assert "written at each of 8 steps: ('cache', 'module.0.module.3') (64,) float32" in shown
    assert shown.endswith("0 warnings, 0 errors\n")


def test_the_command_on_a_users_function(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "my_agent.py").write_text(
        "from tdhook_rl.examples.check import setup\n"
        "def broken():\n"
        "    policy, env, arguments = setup()\n"
        "    return policy, env, arguments | {'policy_device': 'cuda:99'}\n"
        "def nothing():\n"
        "    return 1\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["check", "my_agent:broken"]) == 1
    assert "error devices" in capsys.readouterr().out.replace("error   devices", "error devices")
    for target, message in (
        ("my_agent", "write MODULE:FUNCTION"),
        ("my_agent:brokn", r"has no function 'brokn'; nearest: 'broken'"),
        ("my_agent:value", "has no function 'value'"),
        ("my_agent:nothing", "returned int, where (hooked policy, environment)"),
        ("no_such_module:x", "no module 'no_such_module'"),
    ):
        assert main(["check", target]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_prints_with_and_without_rich(installed: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if not installed:
        monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["check", "--steps", "2"]) == 0
    assert ("┃" in capsys.readouterr().out) == installed
