"""Worker processes: weights and controls that reach them, and workers that die, hang or cannot do what is asked."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import AsyncBatchedCollector, Collector, Evaluator, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import ParallelEnv
from torchrl.weight_update import MultiProcessWeightSyncScheme

from tdhook_rl import ActivationCaching, SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, KeyCollisionError, WorkerError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import Guarded, set_controls
from tdhook_rl.rollout.workers import Caller, descendants, workers_of
from tests.collecting import PROBES, RESULTS, Learner, check, env_functions, prepared_actor, rows_of, version_of
from tests.left_processes import left_behind

pytestmark = pytest.mark.limit(150)
#: Workers that were forked were seen, now and then, to end later than spawned ones, on a busy machine.
spawned = pytest.mark.usefixtures("spawned")


def alive(pids: list[int]) -> list[int]:
    """Which processes run; those that have ended and wait to be collected do not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        found += [pid] if state != "Z" else []
    return found


def test_workers_follow_weights_in_every_form_and_controls() -> None:
    learner = Learner()
    collector = MultiSyncCollector(
        env_functions(), learner.policy, frames_per_batch=32, total_frames=-1, postproc=learner.policy.annotate
    )
    forms: list[Any] = [None, TensorDict.from_module(learner.actor), learner.policy, learner.actor.state_dict()]
    batches = []
    with Guarded(collector, timeout=60) as guarded:
        for data, form in zip(guarded, [*forms, None], strict=False):
            batches.append(data.clone())
            learner.step()  # the forms above hold the tensors themselves
            guarded.update_policy_weights_(form)
            if len(batches) == 2:
                set_controls(guarded, {"steering.alpha": 2.0, "probe.x.weight": PROBES[1].weight})
        # In this form the workers could not read them, and the learner would wait for ever.
        with pytest.raises(InputError, match="which the policy does not have"):
            guarded.update_policy_weights_(TensorDict({"pol": TensorDict.from_module(learner.actor)}))
    versions = [version_of(rows_of([one]), learner.versions).unique().tolist() for one in batches]
    assert versions == [[0], [1], [2], [3], [4]]
    alphas = [one["control", "steering.alpha"].unique().tolist() for one in batches]
    assert alphas == [[0.5], [0.5], [2.0], [2.0], [2.0]]
    for what in ("steering", *RESULTS):
        check(rows_of(batches), learner.versions, what)
    assert bool(batches[0]["next", "done"].any())  # the rows compared go across the ends of episodes


@spawned
@pytest.mark.parametrize("during", ["an update", pytest.param("a batch", marks=pytest.mark.slow)])
def test_a_killed_worker_is_named_and_nothing_is_left(during: str) -> None:
    environments = env_functions(2, ())
    if during == "a batch":  # workers that have processes of their own
        environments = [partial(ParallelEnv, 1, one) for one in environments]
    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    collector = MultiSyncCollector(environments, policy, frames_per_batch=16, total_frames=-1)
    guarded = Guarded(collector, timeout=60)
    iterator = iter(guarded)
    next(iterator)
    victim = collector.procs[1].pid
    pids = [worker.pid for worker in collector.procs]
    below = [pid for pid, _ in descendants(pids)]
    assert len(below) >= (2 if during == "a batch" else 0)
    os.kill(victim, signal.SIGKILL)
    message = rf"^worker 1 \(process {victim}\) of MultiSyncCollector was killed by SIGKILL"
    with pytest.raises(WorkerError, match=message):
        next(iterator) if during == "a batch" else guarded.update_policy_weights_()
    assert alive(pids + below) == []
    guarded.shutdown()  # a second time, as in a `finally`


@spawned
@pytest.mark.slow
def test_a_worker_that_dies_in_the_background_is_noticed() -> None:
    learner = Learner()
    buffer = ReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=8, shared=True)
    collector = MultiAsyncCollector(
        env_functions(2, ()), learner.policy, frames_per_batch=16, total_frames=-1, replay_buffer=buffer
    )
    with Guarded(collector, timeout=60) as guarded:
        guarded.start()
        while len(buffer) < 64:
            guarded.check()
            time.sleep(0.05)
        os.kill(collector.procs[0].pid, signal.SIGKILL)
        collector.procs[0].join(10)
        with pytest.raises(WorkerError, match=r"worker 0 .* was killed by SIGKILL"):
            guarded.check()
    assert not left_behind()


class Stuck(CueCorners):
    """An environment that stops answering after some steps."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if int(tensordict["elapsed"].max()) == 3:
            time.sleep(1000)
        return super()._step(tensordict)


@spawned
@pytest.mark.slow
def test_a_worker_that_hangs_is_an_error_after_the_time_limit() -> None:
    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    guarded = Guarded(MultiSyncCollector([Stuck], policy, frames_per_batch=32, total_frames=-1), timeout=3)
    with pytest.raises(WorkerError, match=r"did not bring a batch within 3 s although worker 0 \(process \d+\) live"):
        next(iter(guarded))
    assert not left_behind()


@spawned
@pytest.mark.slow
def test_an_error_in_a_worker_and_one_of_the_users_are_told_apart() -> None:
    def fail(data: TensorDictBase) -> TensorDictBase:
        raise ZeroDivisionError("mine")

    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    collector = MultiSyncCollector(env_functions(1), policy, frames_per_batch=16, total_frames=-1, postproc=fail)
    with Guarded(collector, timeout=60) as guarded, pytest.raises(ZeroDivisionError, match="mine"):
        next(iter(guarded))
    assert not left_behind()


class Renamed(CueCorners):
    """Writes what the policy writes as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        spec = self.observation_spec.clone()
        spec["cache"] = spec["elapsed"].clone()
        self.observation_spec = spec

    def _describe(self, *args: Any) -> TensorDict:
        data = super()._describe(*args)
        return data.set("cache", data["elapsed"])


@spawned
@pytest.mark.slow
def test_a_collision_in_a_worker_is_an_error_here() -> None:
    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    with pytest.raises(KeyCollisionError, match="collides with the environment's key"):
        MultiSyncCollector([Renamed], policy, frames_per_batch=16, total_frames=-1)


def test_controls_of_policies_made_in_workers() -> None:
    learner = Learner()
    collector = MultiSyncCollector(
        env_functions(1),
        policy_factory=prepared_actor,
        frames_per_batch=16,
        total_frames=-1,
        weight_sync_schemes={"policy": MultiProcessWeightSyncScheme()},
    )
    with Guarded(collector, timeout=60) as guarded:
        found = []
        for data in guarded:
            found.append(data["control", "steering.alpha"].unique().tolist())
            if len(found) == 3:
                break
            set_controls(guarded, {"steering.alpha": float(len(found))})
        assert found == [[0.5], [1.0], [2.0]]
        with pytest.raises(InputError, match="has shape"):
            set_controls(guarded, {"steering.alpha": torch.zeros(3)})
        with pytest.raises(KeyError, match="nearest: 'steering"):
            set_controls(guarded, {"steering.alfa": 1.0})
    del learner


# ---------------------------------------------------------------------- without processes


def test_where_the_workers_cannot_be_told_it_says_so() -> None:
    policy = SteeringVectors({FC2: torch.ones(64)}).prepare(make_actor(), return_context=False)
    values = {"steering.alpha": 1.0}
    handing_out = SimpleNamespace(
        procs=[], policy=None, policy_factory=[prepared_actor], running=True, _running_free=False, num_workers=1
    )
    with pytest.raises(WorkerError, match="loses its batch and waits for ever"):
        set_controls(handing_out, values)
    served = AsyncBatchedCollector(
        env_functions(2, ()), policy_factory=prepared_actor, frames_per_batch=8, env_backend="multiprocessing",
        transport="auto",
    )  # fmt: skip
    with pytest.raises(WorkerError, match="serves a policy of policy_factory from a process"):
        set_controls(served, values)
    served.shutdown()
    evaluator = Evaluator(CueCorners, policy_factory=lambda env: policy, backend="thread")
    with pytest.raises(WorkerError, match="has no policy yet"):
        set_controls(evaluator, values)
    evaluator.shutdown()
    with pytest.raises(WorkerError, match="offers no way"):
        set_controls(SimpleNamespace(policy=policy, iterator=None), values)
    inner = SimpleNamespace(policy=None, remote_collectors=[None], collector_class=MultiSyncCollector)
    with pytest.raises(WorkerError, match="processes of their own"):
        set_controls(inner, values)
    closed = Collector(CueCorners(), policy, frames_per_batch=8, total_frames=8)
    closed.shutdown()
    with pytest.raises(WorkerError, match="has been shut down"):
        set_controls(closed, values)
    assert float(policy.controls["steering.alpha"]) == 1.0


def test_controls_in_an_evaluator() -> None:
    policy = SteeringVectors({FC2: torch.ones(64)}).prepare(make_actor(), return_context=False)
    evaluator = Evaluator(CueCorners(batch_size=[2]), policy, num_trajectories=2, max_steps=4)
    set_controls(evaluator, {"steering.alpha": 3.0})
    assert float(policy.controls["steering.alpha"]) == 3.0
    with Guarded(evaluator) as guarded:
        assert "eval/reward" in guarded.evaluate(make_actor())
        set_controls(guarded, {"steering.alpha": 4.0})
    assert float(policy.controls["steering.alpha"]) == 4.0


def test_a_call_that_never_returns_is_left_behind() -> None:
    caller = Caller("thing", lambda: [])
    assert caller.call("a number", lambda: 3, 10.0) == 3
    with pytest.raises(ValueError, match="own"):
        caller.call("a number", lambda: int("own"), 10.0)
    with pytest.raises(WorkerError, match=r"thing did not bring a number within 0\.2 s: a worker waits"):
        caller.call("a number", lambda: time.sleep(20), 0.2)


def test_workers_of_what_has_none() -> None:
    assert workers_of(SimpleNamespace()) == []
    assert descendants([os.getpid()]) == set() or all(pid > 0 for pid, _ in descendants([os.getpid()]))
