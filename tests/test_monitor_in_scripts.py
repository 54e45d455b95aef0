"""Two lines in TorchRL's own scripts: each trains as without them, to the bit, and each log holds both, unharmed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from tensordict import TensorDictBase
from torch import nn
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.wandb import WandbLogger

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import GroupSplit, NetworkDiagnostics, OnlineProbe
from tests.training_scripts import SCRIPTS
from tests.wandb_reader import finished

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
VALUES = ("dqn", "iql")


class Recorder:
    """A logger of the script's own."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int | None]] = []

    def log_scalar(self, name: str, value: Any, step: int | None = None) -> None:
        self.rows.append((name, float(value), step))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.log_scalar(name, value, step)


@contextmanager
def nobody(policy: Any, buffer: Any = None) -> Iterator[Any]:
    yield SimpleNamespace(policy=policy, step=lambda batch=None: None)


def site_of(policy: nn.Module) -> str:
    return next(path for path, one in policy.named_modules() if isinstance(one, nn.Tanh | nn.ReLU))


def late(data: TensorDictBase) -> torch.Tensor:
    steps = data.get("step_count", data.get("elapsed", None))
    return (steps > 4).long()


def run(name: str, logger: Any, folder: Path) -> tuple[Monitor, dict[str, torch.Tensor]]:
    """A script with the two lines, and all that a monitor can look at; the monitor and the weights."""
    monitors = []

    @contextmanager
    def watch(policy: Any, buffer: Any = None) -> Iterator[Any]:
        target = targets.chosen_q() if name in VALUES else targets.taken_action_log_prob()
        site = site_of(policy)
        with Compose(ActivationCaching(site), Saliency(target=target)).prepare(policy) as hooked:
            monitor = Monitor(
                hooked, logger, folder=folder, buffer=buffer, media_every=2, table_every=2,
                probes={"late": OnlineProbe(features=("cache", site), label=late, split=GroupSplit(late_key(name)))},
                diagnostics=NetworkDiagnostics(policy, sites=[site]),
            )  # fmt: skip
            monitors.append(monitor)
            yield SimpleNamespace(policy=hooked, step=monitor.step)
            monitor.close()

    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # that CSV shows no pictures, and that few rows are no score
        weights = SCRIPTS[name](logger, watch)
    assert not [one for one in told if "could not log" in str(one.message)]
    return monitors[0], weights


def late_key(name: str) -> str:
    return "elapsed" if name in ("mappo", "iql") else "step_count"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_two_lines(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = Recorder()
    weights = SCRIPTS[name](alone, nobody)
    logger = WandbLogger("x", save_dir=str(tmp_path), mode="offline", log_env_packages=False, settings=QUIET)
    monitor, watched = run(name, logger, tmp_path / "local")
    rows = finished(logger.experiment)
    ours = [row for row in rows if "interp/step" in row]
    local = FileSink.read(tmp_path / "local" / "log.csv")
    # Ours lie on an axis of their own, and are what the folder holds.
    shown = next(key for key in local if key.startswith("attr.") and key.endswith("observation"))
    looks = [row for row in ours if f"interp/{shown}" in row]
    assert [(row["interp/step"], row[f"interp/{shown}"]) for row in looks] == local[shown]
    assert ours[: len(looks)] == looks  # at the end comes the last table of probes
    steps = [row["interp/step"] for row in looks]
    assert steps == sorted(set(steps))
    assert steps[-1] == monitor.frames
    assert len(steps) >= 3
    assert any(key.startswith("interp/bars.") for row in ours for key in row)
    assert any("interp/episodes/path" in row for row in ours)
    assert any(key.startswith("interp/dormant.") for row in ours for key in row)
    assert any(key.startswith("interp/probe.late.") for row in ours for key in row)
    # The script's own rows: each value at its own step, as without us.
    theirs: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(("train/", "eval/")) and not key.endswith("/step"):
                theirs.setdefault(key, []).append(value)
    expected: dict[str, list[float]] = {}
    for key, value, _ in alone.rows:
        expected.setdefault(key, []).append(value)
    if name == "sac_of_a_filling_buffer":  # its thread collects when it likes: no two runs are the same
        assert {key: len(values) for key, values in theirs.items()} == dict.fromkeys(expected, 6)
        return
    assert theirs == {key: pytest.approx(values) for key, values in expected.items()}
    assert all(torch.equal(value, watched[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", ["sac", "mappo"])
def test_torchrls_csv_logger_keeps_both_apart(name: str, tmp_path: Path) -> None:
    logger = CSVLogger("run", log_dir=str(tmp_path))
    monitor, _ = run(name, logger, tmp_path / "local")
    scalars = tmp_path / "run" / "scalars"
    own = sorted(path.relative_to(scalars).parts[0] for path in scalars.rglob("*.csv"))
    assert {"interp"} < set(own)
    lines = next(scalars.glob("interp/attr*observation.csv")).read_text().splitlines()
    assert int(lines[-1].split(",")[0]) == monitor.frames
    facts = json.loads((tmp_path / "local" / "config.json").read_text())
    assert facts["targets"] == ["taken_action_log_prob"]
