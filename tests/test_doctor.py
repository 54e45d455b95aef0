"""The doctor: what it says of healthy set-ups, its report, and its command."""

from __future__ import annotations

import copy
import io
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs import CatFrames, CatTensors, GymEnv, Transform, TransformedEnv, VecNormV2
from torchrl.envs import Compose as ComposeTransforms
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.attribution import SARFA
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import CheckError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import Finding, Report, check
from tests.doctor_set_ups import env, found, hooked
from tests.method_table import SAMPLES
from tests.policies import Case

CASE = Case(make_actor, FC2, features=(64,))


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
        assert not policy._hooked.runtime.slots
        assert source.reset()["observation"].equal(twin.reset()["observation"])  # and so is its generator
    assert report.ok
    report.raise_if_failed()
    assert {one.level for one in report.findings} == {"ok"}, str(report)
    assert [one.check for one in report.findings] == [
        "tie", "original", "weights", "deepcopy", "pickle", "names", "inputs", "sites", "keys", "environment keys",
        "shapes", "finite", "values", "schedules", "annotate", "modules", "devices", "collector", "kept",
    ]  # fmt: skip
    assert "('cache', 'module.0.module.3') (64,) float32" in found(report, "keys", "ok").seen
    assert "('attr', 'observation')" in found(report, "annotate", "ok").seen


@pytest.mark.parametrize(
    "name", [name for name, sample in SAMPLES.items() if not sample.second and "relu" in sample.policies]
)
def test_no_method_alarms_it(name: str) -> None:
    actor = make_actor()
    method = SAMPLES[name].make(CASE)
    if isinstance(method, SARFA):
        # The features of the row's groups are seldom set here: their relevance is 0 throughout, or a rounding error.
        method = replace(method, groups=None)
    with method.prepare(actor) as policy:
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


NEW: dict[str, Callable[[], Transform]] = {
    "frames": lambda: CatFrames(N=3, dim=-1, in_keys=["observation"], out_keys=["stack"]),
    "among others": lambda: ComposeTransforms(
        CatTensors(["observation"], out_key="stack", del_keys=False), CatFrames(N=3, dim=-1, in_keys=["stack"])
    ),
    "statistics": lambda: VecNormV2(in_keys=["observation"], out_keys=["stack"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("was_reset", [False, True])
def test_environments_that_have_not_begun(name: str, was_reset: bool) -> None:
    source = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), NEW[name]())
    if was_reset:
        source.reset()
    width = 4 if name == "statistics" else 12
    net = TensorDictModule(torch.nn.Linear(width, 2), ["stack"], ["logits"])
    actor = ProbabilisticActor(net, ["logits"], distribution_class=torch.distributions.Categorical)
    with Saliency().prepare(actor) as policy:
        report = check(policy, source, {"frames_per_batch": 32, "postproc": policy.annotate})
    assert report.ok, str(report)


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
        ("my_agent:nothing", "returned int: it must return"),
        ("no_such_module:x", "no module is named 'no_such_module'"),
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
