"""The doctor on the collector and torch.compile: one broken set-up for each finding."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import AsyncBatchedCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.collectors.distributed import DistributedCollector, RayCollector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage, ReplayBuffer
from torchrl.envs import SelectTransform
from torchrl.envs.utils import exploration_type
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, SteeringVectors
from tdhook_rl.doctor.check import _Examination
from tdhook_rl.doctor.collecting import failure
from tdhook_rl.doctor.dry_run import Deadline
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent.probing import Probing
from tdhook_rl.rollout import check
from tests.doctor_set_ups import FEATURES, Acting, Changed, env, found, hooked
from tests.left_processes import left_behind


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
    assert check(policy, env(), {"replay_buffer": buffer(), "init_random_frames": 500}).ok
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
    assert "masked" in found(report, "random frames", "ok").seen


def test_masks_that_are_cleared() -> None:
    def clear(data: TensorDictBase) -> TensorDictBase:
        return data.set(("computed", "cache"), torch.zeros(data.batch_size, dtype=torch.bool))

    one = found(check(hooked(make_actor()), env(), {"postproc": clear}), "schedules", "error")
    assert "no row of 'cache' was computed in the batches of the collector" in one.seen


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


class Empty(Collector):
    def iterator(self) -> Iterator[TensorDictBase]:
        yield from ()


def test_whole_trajectories_and_nothing_at_all() -> None:
    report = check(hooked(make_actor()), env(), {"trajs_per_batch": 100, "traj_format": "padded"})
    assert report.ok, str(report)
    assert "gave nothing" in found(check(hooked(make_actor()), env(), collector=Empty), "collector", "error").seen


def test_what_is_not_to_check() -> None:
    with pytest.raises(InputError, match="not one; give what"):
        check(make_actor(), env())
    with pytest.raises(InputError, match=r"its module 'module\.0' is: prepare the outermost"):
        check(TensorDictSequential(hooked(make_actor())), env())
    with pytest.raises(InputError, match="at least two"):
        check(hooked(make_actor()), env(), steps=1)
    with pytest.raises(InputError, match="has no workers: leave out num_workers"):
        check(hooked(make_actor()), env(), {"num_workers": 2}, collector=Collector)
    with pytest.raises(InputError, match="has no workers: give one environment"):
        check(hooked(make_actor()), [CueCorners, CueCorners], collector=Collector)
    with pytest.raises(InputError, match=r"num_workers=3 has an environment of its own, got 2"):
        check(hooked(make_actor()), [CueCorners, CueCorners], {"num_workers": 3})
    with pytest.raises(InputError, match=r"each of 3 workers has create_env_kwargs of its own, got 2"):
        check(hooked(make_actor()), CueCorners, {"num_workers": 3, "create_env_kwargs": [{}, {}]})


CHOSEN: dict[str, tuple[Any, Any, dict[str, Any], Any, int]] = {
    "our workers": (CueCorners, None, {"num_workers": 2}, MultiSyncCollector, 2),
    "collectors": (CueCorners, None, {"num_collectors": 2}, MultiAsyncCollector, 2),
    "in turn": (CueCorners, Collector, {"num_collectors": 3, "sync": True}, MultiSyncCollector, 3),
    "a process": (CueCorners, Collector, {"backend": "process", "sync": True}, MultiSyncCollector, 1),
    "of a list": ([CueCorners] * 2, None, {"backend": "process"}, MultiAsyncCollector, 2),
    "elsewhere": ([CueCorners] * 2, None, {"backend": "ray", "num_collectors": 2}, DistributedCollector, 0),
    "here": (CueCorners, Collector, {"backend": "direct"}, Collector, 0),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_workers_are_those_that_the_arguments_of_collector_choose(name: str) -> None:
    """One environment for all was pickled to ``num_collectors``, and the check said that they could not start."""
    given, collector, options, kind, workers = CHOSEN[name]
    trial = _Examination(None, None, given, dict(options), collector, 2, False, Deadline(1.0))
    assert trial._collector() == (kind, workers)
    assert set(trial.options) == ({"backend"} if name == "here" else set())


def test_the_users_probes_are_not_fed() -> None:
    class Probe:
        def step(self, activation: torch.Tensor) -> None:
            self.seen = activation

    probe = Probe()
    report = check(hooked(make_actor(), Probing(FC2, lambda key, direction: probe)), env())
    assert report.ok, str(report)
    assert not hasattr(probe, "seen")


# ------------------------------------------------------------------ time and workers


def test_a_cache_of_the_users_is_not_filled() -> None:
    cache = TensorDict()
    report = check(hooked(make_actor(), ActivationCaching(FC2, cache=cache)), env())
    assert report.ok, str(report)
    assert cache.is_empty()


@pytest.mark.parametrize("where", ["by hand", "collector", "collector of a factory"])
def test_an_environment_that_hangs(where: str) -> None:
    """What goes on later in this process draws nothing there."""
    goes_on, steps, collects = threading.Event(), [], where != "by hand"
    policy = functools.partial(hooked, make_actor()) if where == "collector of a factory" else hooked(make_actor())

    def wait(step: int, data: TensorDictBase) -> None:
        steps.append(step)
        # A collector begins anew, with environments that are copies or are made again.
        if len(steps) == (18 if collects else 3):
            goes_on.wait(60)

    began, others = time.monotonic(), set(threading.enumerate())
    before = exploration_type()
    report = check(policy, functools.partial(Changed, wait), {"frames_per_batch": 64}, time_limit=2.0)
    assert time.monotonic() - began < 30
    assert exploration_type() is before
    what = "batch 0 from Collector" if collects else "the environment at step 2"
    assert found(report, "time limit", "error").seen == f"after 2 s the check still waited for {what}"
    [left] = set(threading.enumerate()) - others
    drawn, made = torch.get_rng_state(), len(steps)
    goes_on.set()
    left.join(30)
    assert not left.is_alive()
    assert len(steps) == made
    assert torch.equal(torch.get_rng_state(), drawn)


def hanging_worker() -> CueCorners:
    time.sleep(60 if multiprocessing.parent_process() else 0)
    return env()


def test_a_worker_that_hangs_is_named_and_stopped() -> None:
    began = time.monotonic()
    report = check(hooked(make_actor()), hanging_worker, {"num_workers": 1}, time_limit=4.0)
    assert time.monotonic() - began < 40
    assert "still waited for the start of 1 worker of MultiSyncCollector" in found(report, "time limit", "error").seen
    assert not left_behind()


def die(step: int, data: TensorDictBase) -> None:
    if step == 2 and multiprocessing.parent_process():
        os._exit(3)


@pytest.mark.slow
def test_a_worker_that_dies_is_named() -> None:
    report = check(hooked(make_actor()), functools.partial(Changed, die), {"num_workers": 1})
    assert re.search(r"batch 0 from 1 worker .*worker 0 \(exit code 3\)", found(report, "dry run", "error").seen)
    assert not left_behind()


class SetsNewKey:
    def __call__(self, data: TensorDictBase) -> None:
        data.set("extra", data["logits"].sum(-1))


def test_a_hook_in_a_worker_whose_keys_are_frozen() -> None:
    report = check(hooked(make_actor()), env, {"num_workers": 1, "post_collect_hook": SetsNewKey()})
    assert found(report, "collector", "ok").seen == "MultiSyncCollector ran with 1 worker, and took weights"
    assert "('extra',) is the same in two batches" in found(report, "frozen", "error").seen
    assert not left_behind()


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


def test_a_list_of_environments_one_for_each_worker() -> None:
    options = {"env_backend": "threading", "create_env_kwargs": [{"seed": 1}, {"seed": 2}]}
    report = check(hooked(make_actor()), [CueCorners, CueCorners], options, collector=AsyncBatchedCollector)
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
    gc.collect()  # collectors of other tests set the number of threads when they are freed, which no trace may meet
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


@pytest.mark.parametrize(
    ("error", "options", "remedy"),
    [
        (RuntimeError("devices differ, got cuda:0 and None"), {}, "storing_device"),
        (RuntimeError("stack expects each tensor to be equal size"), {}, "pad it"),
        (TypeError("expected Tensor as element 0 in argument 0, but got NoneType"), {}, "from the reset on"),
        (AttributeError("Can't pickle local object 'f.<locals>.<lambda>'"), {}, "policy_factory"),
        (RuntimeError("Worker 0 failed to initialize and closed the connection"), {}, "__main__"),
        (KeyError("cache"), {"replay_buffer": object()}, "the first rows of a buffer"),
        (KeyError("cache"), {}, "as it was before prepare"),
    ],
)
def test_remedies_of_known_errors(error: Exception, options: dict, remedy: str) -> None:
    assert remedy in failure(error, "batch 0", options).remedy
