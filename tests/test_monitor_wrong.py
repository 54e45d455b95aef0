"""What goes wrong around a ``Monitor`` stops no training, is said once, and is not logged as something else."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import InputError, MissingKeyError, PreparationError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import Budgets, FileSink, Monitor
from tdhook_rl.report.readings import input_of
from tdhook_rl.rollout import OnlineProbe
from tests.monitoring import METHOD, QUIET, batch_of, said
from tests.wandb_reader import finished


def test_what_a_logger_cannot_show_is_said_at_the_callers_line(tmp_path: Path) -> None:
    logger = CSVLogger("run", log_dir=str(tmp_path))
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, logger) as monitor:
        with said() as told:
            monitor.step(batch_of(policy))
            monitor.step(batch_of(policy))
    assert len(told) == 3
    assert {one.filename for one in told} == {__file__}


def test_values_that_carry_gradients(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = policy.annotate(batch_of(policy))
        for key in ("state_value", "observation", ("attr", "observation"), ("next", "reward")):
            value = torch.randn(8, 10, 1) if key == "state_value" else data[key]
            data[key] = value.detach().clone().requires_grad_()
        assert monitor.step(data) is not None


def test_a_script_that_ends_its_run_before_the_monitor(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    with METHOD.prepare(make_actor()) as policy:
        monitor = Monitor(policy, run)
        monitor.step(batch_of(policy))
        run.finish()
        start = time.monotonic()
        with said() as told:
            monitor.step(batch_of(policy))
            monitor.step(batch_of(policy))
            monitor.close()
    assert time.monotonic() - start < 10
    assert len(told) == 1
    assert "Run failed (UsageError" in str(told[0].message)
    assert len(FileSink.read(monitor.folder / "log.csv")["attr.observation"]) == 3


def test_nothing_stops_training_after_the_first_batch(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, media_every=1) as monitor:
        good = batch_of(policy)
        monitor.step(good)
        with said() as told:
            for _ in range(3):
                assert monitor.step(good.select("action", "next")) is None  # no observation in it
        assert len(told) == 1
        assert "Monitor could not log a batch (MissingKeyError" in str(told[0].message)
        assert monitor.step(good) is not None
    assert len(FileSink.read(tmp_path / "log.csv")["attr.observation"]) == 2


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def label(data: TensorDictBase) -> torch.Tensor:
        if "bad" in data.keys():
            raise RuntimeError("no label today")
        return data["concept", "xor"]

    probe = OnlineProbe(features=("cache", FC2), label=label)
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, probes={"xor": probe}) as monitor:
        monitor.step(batch_of(policy, envs=32))
        with said() as told:
            found = monitor.step(batch_of(policy, envs=32).set("bad", torch.ones(32, 10)))
        assert [str(one.message) for one in told] == [
            "Monitor could not log the probe 'xor' (RuntimeError: no label today); training goes on"
        ]
        assert found is not None
        assert "attr.observation" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out_and_its_share_said(value: float, tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = batch_of(policy).select("observation", "action", "next", "collector")
        data["observation"][:2] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # annotate says that these rows have no results
            found = monitor.step(data)
        assert found is not None
        assert found["computed.attr"] == 0.75
        assert found["attr.observation"] == found["attr.observation"]


def test_a_batch_of_nothing_and_one_of_one_row(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = batch_of(policy)
        assert monitor.step(data[:0]) is None
        assert monitor.step(data[:1, :1]) is not None
        assert monitor.step(data[0, 0]) is not None
    assert monitor.frames == 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every": 0}, "every= is a whole number from 1 on"),
    "a prefix of two levels": ({"prefix": "a/b"}, "names have two levels"),
    "too few names": ({"feature_names": ["a", "b"]}, "feature_names= has 2 names"),
    "names of no input": ({"feature_names": {"observaton": ["a"] * 90}}, "names 'observaton', which is no input"),
    "groups of no input": (
        {"groups": {"observaton": {"lights": [0]}}},
        "groups= names 'observaton', which is no input",
    ),
    "names twice": ({"feature_names": ["a"] * 90}, "all different"),
    "a group beyond": ({"groups": {"lights": [90]}}, "names feature 90 of 'observation', which has 90"),
    "a group before": ({"groups": {"lights": [-1, 2]}}, "names feature -1 of 'observation', which has 90"),
    "a group of floats": ({"groups": {"lights": [0.5]}}, "is a list of indices, or a mask"),
    "frames that are not there": ({"frames_key": "pixels"}, "frames_key= names 'pixels', which the batch lacks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show_at_once(name: str, tmp_path: Path) -> None:
    options, message = MISTAKES[name]
    with METHOD.prepare(make_actor()) as policy:
        data = batch_of(policy)
        with (
            pytest.raises((InputError, MissingKeyError), match=message),
            Monitor(policy, tmp_path, **options) as monitor,
        ):
            monitor.step(data)


def test_names_of_no_input_leave_nothing_behind(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy:
        with pytest.raises(InputError, match="no input of this policy; nearest: 'observation'"):
            Monitor(policy, tmp_path, feature_names={"observaton": ["a"] * 90})
        assert list(tmp_path.iterdir()) == []


def test_an_attribution_is_about_the_longest_input_that_ends_its_key() -> None:
    policy = SimpleNamespace(policy_in_keys=["observation", ("agents", "observation")])
    assert input_of(policy, ("attr", "agents", "observation")) == ("agents", "observation")
    assert input_of(policy, ("attr", "observation")) == "observation"
    assert input_of(policy, ("attr", "state")) is None


def test_a_plain_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match="Monitor takes a hooked policy, got a plain ProbabilisticActor"):
        Monitor(make_actor(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_features_are_many_stays_within_the_budget(tmp_path: Path) -> None:
    net = TensorDictModule(nn.Linear(3000, 1), in_keys=["x"], out_keys=["y"])
    data = TensorDict({"x": torch.randn(4, 3000)}, batch_size=4)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    with (
        Saliency(target=targets.output_sum()).prepare(net) as policy,
        Monitor(policy, run, feature_names=[f"concept {n}" for n in range(3000)], budgets=Budgets(keys=100)) as monitor,
    ):
        with pytest.warns(UserWarning, match=r"more than 100 names to log \(budget\)"):
            monitor.step(data)
        monitor.step(data)
    assert len(FileSink.read(monitor.folder / "log.csv")) > 3000
    rows = finished(run)
    assert len({name for row in rows for name in row if name.startswith("interp/") and name.count("/") == 1}) <= 101


@pytest.mark.parametrize(
    "options",
    [{"prefix": ".."}, {"prefix": " "}, {"prefix": "a\nb"}, {"feature_names": 3}, {"feature_names": "abcdefgh"},
     {"groups": {"a": "x"}}, {"groups": {"a": None}}, {"groups": {"a": [[0], [1, 2]]}}],
    ids=str,
)  # fmt: skip
def test_names_and_groups_that_are_none_are_refused_at_once(options: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(options)).rstrip("s")
    with (
        pytest.raises(InputError, match=f"{name}|the group 'a'"),
        METHOD.prepare(make_actor()) as policy,
        Monitor(policy, tmp_path, **options) as monitor,
    ):
        monitor.step(batch_of(policy))
