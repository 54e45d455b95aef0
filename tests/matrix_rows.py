"""The rows of the compatibility matrix (``tests/matrix.py``): ways to collect, and how each sends weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tensordict import TensorDict
from torchrl.collectors import AsyncBatchedCollector, Collector, Evaluator, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage
from torchrl.envs import ParallelEnv
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme

from tests.collecting import Learner, env_functions, prepared_actor

ROOT = Path(__file__).parents[1]
RAY_FOLDERS: list[str] = []
Consume = Literal["iterate", "buffer", "background", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to collect.

    Args:
        collector, weights: the headings: what collects, and how weights are sent.
        make: the collector, for a learner and a buffer.
        consume: how its data reach the user.
        strict: whether the batch after new weights is computed by them, and by nothing else.
        storage: of the replay buffer.
        lacks: cells that TorchRL does not offer, and why.
        needs: a package.
    """

    collector: str
    weights: str
    make: Callable[[Learner, Any], Any]
    consume: Consume = "iterate"
    strict: bool = True
    storage: Callable[[], Any] | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    needs: str | None = None

    @property
    def name(self) -> str:
        return f"{self.collector} / {self.weights}"


def single(**options: Any) -> Callable[[Learner, Any], Collector]:
    def make(learner: Learner, buffer: Any) -> Collector:
        given = {"frames_per_batch": 32, "total_frames": -1, "auto_register_policy_transforms": False} | options
        batch = (2,) if buffer is None else ()
        return Collector(env_functions(1, batch)[0](), learner.policy, replay_buffer=buffer, **given)

    return make


def several(cls: type, scheme: type, factory: bool = False, **options: Any) -> Callable[[Learner, Any], Any]:
    def make(learner: Learner, buffer: Any) -> Any:
        policy = {"policy_factory": prepared_actor} if factory else {"policy": learner.policy}
        environments = env_functions(2, (2,) if buffer is None else ())
        given = {"frames_per_batch": 32, "total_frames": -1, "replay_buffer": buffer} | options
        return cls(environments, weight_sync_schemes={"policy": scheme()}, **policy, **given)

    return make


def batched(factory: bool = False, **options: Any) -> Callable[[Learner, Any], AsyncBatchedCollector]:
    def make(learner: Learner, buffer: Any) -> AsyncBatchedCollector:
        policy = {"policy_factory": prepared_actor} if factory else {"policy": learner.policy}
        return AsyncBatchedCollector(
            env_functions(3, ()), frames_per_batch=24, total_frames=-1, replay_buffer=buffer, **policy, **options
        )

    return make


def evaluator(factory: bool = False, **options: Any) -> Callable[[Learner, Any], Evaluator]:
    def make(learner: Learner, seen: Any) -> Evaluator:
        env = env_functions(1, (2,) if not factory else ())[0]
        policy = {"policy_factory": prepared_actor} if factory else {"policy": learner.policy}
        return Evaluator(
            env if factory else env(),
            num_trajectories=4,
            max_steps=8,
            frames_per_batch=16,
            metrics_fn=lambda data: seen.append(data.clone()) or {},
            collector_kwargs={"traj_format": "padded"},
            **policy,
            **options,
        )

    return make


def on_ray(factory: bool = False, sync: bool = True) -> Callable[[Learner, Any], Any]:
    def make(learner: Learner, buffer: Any) -> Any:
        from torchrl.collectors.distributed import RayCollector

        start_ray()
        policy = {"policy_factory": prepared_actor} if factory else {"policy": learner.policy}
        collector = RayCollector(
            env_functions(2),
            frames_per_batch=32,
            total_frames=10_000,
            sync=sync,
            remote_configs={"num_cpus": 1, "num_gpus": 0},
            **policy,
        )
        collector.update_policy_weights_(TensorDict.from_module(learner.actor))
        return collector

    return make


def start_ray() -> None:
    """A local Ray: no dashboard, a small object store, files in a folder of its own."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    RAY_FOLDERS.append(tempfile.mkdtemp(prefix="ray_"))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=RAY_FOLDERS[-1],
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )


def stop_ray() -> None:
    """End the Ray of :func:`start_ray`, and remove its files."""
    import ray

    ray.shutdown()
    while RAY_FOLDERS:
        shutil.rmtree(RAY_FOLDERS.pop(), ignore_errors=True)


NOT_GIVEN = {"none": "TorchRL wants the weights to be given"}
FACTORY = {"none": "TorchRL has no policy to take them from"}
SHARED = "SharedMemWeightSyncScheme"
SENT = "MultiProcessWeightSyncScheme"

ROWS = [
    Row(collector="Collector", weights="same policy", make=single()),
    Row(collector="Collector, device-copied", weights="copied", make=single(policy_device="cpu:0")),
    Row(
        collector="Collector, device-copied, stored elsewhere",
        weights="copied",
        make=single(policy_device="cpu:0", storing_device="cpu"),
    ),
    Row(
        collector="Collector, compiled (inductor)",
        weights="same policy",
        make=single(compile_policy={"fullgraph": True}),
    ),
    Row(collector="Collector, use_buffers=False", weights="same policy", make=single(use_buffers=False)),
    Row(
        collector="Collector, trajs_per_batch, padded",
        weights="same policy",
        make=single(trajs_per_batch=4, traj_format="padded"),
        strict=False,
    ),
    Row(
        collector="Collector, trajs_per_batch, cat",
        weights="same policy",
        make=single(trajs_per_batch=4, traj_format="cat"),
        strict=False,
    ),
    Row(collector="Collector, init_random_frames", weights="same policy", make=single(init_random_frames=32)),
    Row(
        collector="Collector, over ParallelEnv",
        weights="same policy",
        make=lambda learner, buffer: Collector(
            ParallelEnv(2, env_functions(1, ())[0]), learner.policy, frames_per_batch=32, total_frames=-1
        ),
    ),
    *(
        Row(
            collector=f"Collector, replay_buffer={name}",
            weights="same policy",
            make=single(),
            consume="buffer",
            storage=partial(storage, 4096),
        )
        for name, storage in (
            ("tensor", LazyTensorStorage),
            ("memmap", LazyMemmapStorage),
            ("list", ListStorage),
        )
    ),
    Row(
        collector="Collector, start() in the background",
        weights="same policy",
        make=single(),
        consume="background",
        storage=partial(LazyTensorStorage, 200_000),
        strict=False,
    ),
    *(
        Row(collector="MultiSyncCollector", weights=weights, make=several(MultiSyncCollector, scheme))
        for weights, scheme in ((SHARED, SharedMemWeightSyncScheme), (SENT, MultiProcessWeightSyncScheme))
    ),
    *(
        Row(
            collector="MultiSyncCollector, policy_factory",
            weights=weights,
            make=several(MultiSyncCollector, scheme, factory=True),
            lacks=FACTORY,
        )
        for weights, scheme in ((SHARED, SharedMemWeightSyncScheme), (SENT, MultiProcessWeightSyncScheme))
    ),
    Row(
        collector="MultiSyncCollector, shared buffer",
        weights=SHARED,
        make=several(MultiSyncCollector, SharedMemWeightSyncScheme),
        consume="buffer",
        storage=partial(LazyTensorStorage, 4096),
    ),
    *(
        Row(
            collector="MultiAsyncCollector",
            weights=weights,
            make=several(MultiAsyncCollector, scheme),
            strict=False,
        )
        for weights, scheme in ((SHARED, SharedMemWeightSyncScheme), (SENT, MultiProcessWeightSyncScheme))
    ),
    Row(
        collector="MultiAsyncCollector, policy_factory",
        weights=SENT,
        make=several(MultiAsyncCollector, MultiProcessWeightSyncScheme, factory=True),
        lacks=FACTORY,
        strict=False,
    ),
    *(
        Row(
            collector=f"MultiAsyncCollector, shared buffer ({name})",
            weights=SHARED,
            make=several(MultiAsyncCollector, SharedMemWeightSyncScheme),
            consume="buffer",
            storage=partial(storage, 4096),
            strict=False,
        )
        for name, storage in (("tensor", LazyTensorStorage), ("memmap", LazyMemmapStorage))
    ),
    Row(
        collector="MultiAsyncCollector, start() in the background",
        weights=SHARED,
        make=several(MultiAsyncCollector, SharedMemWeightSyncScheme),
        consume="background",
        storage=partial(LazyTensorStorage, 200_000),
        strict=False,
    ),
    Row(
        collector="MultiAsyncCollector, start(), policy_factory",
        weights=SENT,
        make=several(MultiAsyncCollector, MultiProcessWeightSyncScheme, factory=True),
        consume="background",
        storage=partial(LazyTensorStorage, 200_000),
        lacks=FACTORY,
        strict=False,
    ),
    *(
        Row(
            collector=f"AsyncBatchedCollector, {name}",
            weights="given",
            make=batched(transport="driver", **options),
            lacks=NOT_GIVEN,
            strict=False,
        )
        for name, options in (
            ("environments in threads", {"env_backend": "threading"}),
            ("environments in processes (shm)", {"env_backend": "multiprocessing"}),
            ("environments in processes (queue)", {"env_backend": "multiprocessing", "env_exchange": "queue"}),
        )
    ),
    Row(
        collector="AsyncBatchedCollector, policy in a process",
        weights="given",
        make=batched(factory=True, env_backend="multiprocessing", transport="auto", transition_chunk_size=8),
        lacks=NOT_GIVEN,
        strict=False,
    ),
    Row(
        collector="Evaluator, thread",
        weights="given",
        make=evaluator(),
        consume="evaluate",
    ),
    Row(
        collector="Evaluator, process",
        weights="given",
        make=evaluator(factory=True, backend="process"),
        consume="evaluate",
        lacks=FACTORY,
    ),
    Row(collector="RayCollector", weights="RayWeightSyncScheme", make=on_ray(), needs="ray"),
    Row(
        collector="RayCollector, policy_factory",
        weights="RayWeightSyncScheme",
        make=on_ray(factory=True),
        lacks=FACTORY,
        needs="ray",
    ),
    Row(
        collector="RayCollector, asynchronous",
        weights="RayWeightSyncScheme",
        make=on_ray(sync=False),
        strict=False,
        needs="ray",
    ),
]
