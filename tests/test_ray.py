"""TorchRL's RayCollector, on a local Ray that the test starts and stops."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, KeyCollisionError, WorkerError
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import Guarded, set_controls
from tdhook_rl.rollout.workers import descendants
from tests.collecting import Learner, rows_of
from tests.matrix_rows import start_ray, stop_ray

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tdhook_rl[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.limit(300), pytest.mark.filterwarnings("ignore")]


class Telling(CueCorners):
    """Tells in which process it runs."""

    @property
    def process(self) -> int:
        return os.getpid()


@pytest.fixture
def local_ray() -> Iterator[None]:
    before = {pid for pid, _ in descendants([os.getpid()])}  # such as inductor's, of an earlier test
    start_ray()
    started = {pid for pid, _ in descendants([os.getpid()])} - before
    assert started
    try:
        yield
    finally:
        stop_ray()
        limit = time.monotonic() + 30
        while running(started) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not running(started), "Ray left processes behind"


def running(pids: set[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def make_collector(learner: Learner, env: type = Telling, **options: Any) -> Any:
    from torchrl.collectors.distributed import RayCollector

    collector = RayCollector(
        [env, env],
        learner.policy,
        frames_per_batch=32,
        total_frames=10_000,
        sync=True,
        remote_configs={"num_cpus": 1, "num_gpus": 0},
        **options,
    )
    collector.update_policy_weights_(TensorDict.from_module(learner.actor))
    return collector


def test_a_remote_worker_that_is_killed_is_named(local_ray: None) -> None:
    learner = Learner()
    collector = make_collector(learner)
    guarded = Guarded(collector, timeout=60)
    iterator = iter(guarded)
    next(iterator)
    processes = collector.get_distant_attr("env.process")
    os.kill(processes[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="remote worker 1 of RayCollector died"):
        next(iterator)
    time.sleep(1)
    assert not running(set(processes))


def test_what_remote_workers_are_told(local_ray: None) -> None:
    learner = Learner()
    with Guarded(make_collector(learner), timeout=60) as guarded:
        iterator = iter(guarded)
        set_controls(guarded, {"steering.alpha": 3.0})
        assert rows_of([next(iterator)])["control", "steering.alpha"].unique().tolist() == [3.0]
        with pytest.raises(InputError, match="has shape"):
            set_controls(guarded, {"steering.alpha": torch.zeros(2)})
        # They read a flat list: with some of the weights only they would wait for the rest.
        some = TensorDict.from_module(learner.actor).select(("module", "0", "module", "0"))
        with pytest.raises(InputError, match="read the whole of the weights, but 'module"):
            guarded.update_policy_weights_(some)
        assert next(iterator) is not None


def test_a_monitor_logs_what_remote_workers_collect(local_ray: None, tmp_path: Path) -> None:
    learner = Learner()
    with Guarded(make_collector(learner), timeout=60) as guarded, Monitor(learner.policy, tmp_path) as monitor:
        iterator = iter(guarded)
        for _ in range(2):
            data = next(iterator)
            found = monitor.step(data)
            assert found is not None
            assert found["computed.cache"] == 1.0
        assert monitor.frames == 64
    curves = FileSink.read(tmp_path / "log.csv")
    assert [step for step, _ in curves["computed.cache"]] == [32, 64]


class Renamed(CueCorners):
    """Writes what the policy writes as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        spec = self.observation_spec.clone()
        spec["cache"] = spec["elapsed"].clone()
        self.observation_spec = spec


def test_a_collision_in_a_remote_worker_is_an_error_here(local_ray: None) -> None:
    with pytest.raises(Exception, match="collides with the environment's key") as raised:
        make_collector(Learner(), Renamed)
    assert KeyCollisionError.__name__ in str(raised.value)
