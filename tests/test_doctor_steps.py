"""The doctor on what happens step by step: one broken set-up for each finding."""

from __future__ import annotations

import threading

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs import GymEnv, ParallelEnv
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_rl import ActivationCaching, Saliency, SteeringVectors
from tdhook_rl.calls.passes import Call
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.method import Binder, BoundMethod, Method
from tdhook_rl.rollout import check
from tdhook_rl.scheduled import Scheduled
from tests.doctor_set_ups import FEATURES, Acting, Changed, Overflow, env, found, hooked


def test_inputs_that_the_environment_does_not_give() -> None:
    net = TensorDictModule(nn.Linear(FEATURES, 4), in_keys=["pixels"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    one = found(check(hooked(actor, ActivationCaching("module.0.module")), env()), "inputs", "error")
    assert "'pixels'" in one.seen
    assert "observation" in one.remedy
    steered = hooked(make_actor(), SteeringVectors({FC2: torch.ones(64)}, alpha="alpha"))
    assert "an intervention reads it" in found(check(steered, env()), "inputs", "error").remedy


def test_numbers_where_the_environment_takes_one_hot_actions() -> None:
    """TorchRL would take the first action at every step, without a word."""
    net = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["logits"])
    for distribution, fits in ((Categorical, False), (OneHotCategorical, True)):
        actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=distribution)
        report = check(hooked(actor, Saliency()), GymEnv("CartPole-v1"))
        if fits:
            assert report.ok, str(report)
        else:
            one = found(report, "actions", "error")
            assert "'action' is () int64" in one.seen
            assert "categorical_action_encoding=True" in one.remedy
            assert check(hooked(actor, Saliency()), GymEnv("CartPole-v1", categorical_action_encoding=True)).ok


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
    one = found(report, "schedules", "error")
    assert one.seen == "no row of 'cache' was computed in 40 steps: its mask is false throughout"


def test_schedules_with_long_periods_and_masks_of_their_own() -> None:
    for schedule in (
        Scheduled(Saliency(when="step"), every=40),
        Scheduled(Saliency(when="step"), fraction=0.5),
        Scheduled(Saliency(), every=2),
    ):
        policy = hooked(make_actor(), schedule)
        report = check(policy, env(), {"frames_per_batch": 160, "postproc": policy.annotate})
        assert report.ok, str(report)
        assert not report.of_level("warning"), str(report)
    never = Scheduled(Saliency(when="step"), where="done")  # an episode that is done is never acted in
    report = check(hooked(make_actor(), never), env(), {"frames_per_batch": 80})
    assert "no row of 'attr' was computed in 40 steps" in found(report, "schedules", "error").seen


def test_annotate_that_does_not_repeat_the_steps() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 32), nn.Dropout(0.5), nn.Linear(32, 4))
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    one = found(check(hooked(actor, ActivationCaching("module.0.module.1")), env()), "annotate", "warning")
    assert "('cache', 'module.0.module.1') by up to" in one.seen


class Silent(BoundMethod, Method):
    """A method that declares a result and writes none."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.result_keys = (("silent", "x"),)
        self.reads_forward = self.replays = False

    def bind(self, binder: Binder) -> Silent:
        return self

    def compute(self, call: Call) -> dict:
        return {}


def test_a_method_that_does_not_write_what_it_declares() -> None:
    one = found(check(hooked(make_actor(), Silent("batch")), env()), "annotate", "error")
    assert "did not write ('computed', 'silent'), ('silent', 'x')" in one.seen
    report = check(hooked(make_actor(), Silent("step")), env())
    missing = [one.seen for one in report.of_level("error") if one.check == "keys"]
    assert missing == [
        "('computed', 'silent') is declared, and was not written at step 0 (16 of 16)",
        "('silent', 'x') is declared, and was not written at step 0 (16 of 16)",
    ]


def test_shapes_that_annotate_does_not_repeat() -> None:
    class OneRow(nn.Module):
        """As recurrent layers do: what has no batch dimension gets one."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(FEATURES, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if x.ndim > 1 else self.inner(x[None])[0]

    net = TensorDictModule(OneRow(), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    report = check(hooked(actor, ActivationCaching("module.0.module.inner")), CueCorners())
    one = found(report, "annotate", "warning")
    assert "('cache', 'module.0.module.inner') the shape (4,), each step gave (1, 4)" in one.seen


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


def test_workers_of_a_started_environment_are_left_alone() -> None:
    source = ParallelEnv(1, CueCorners)
    try:
        source.reset()
        report = check(hooked(make_actor()), source)
        assert "has started its workers" in found(report, "dry run", "error").seen
        assert source.rollout(2).shape == (1, 2)
    finally:
        source.close()
