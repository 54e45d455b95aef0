"""The collector itself, on copies and for a few frames: what it takes, keeps and repeats."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDict, TensorDictBase

from tdhook_rl.doctor.dry_run import Deadline, env_options, first_line, fresh_env
from tdhook_rl.rollout.interrupts import starting_workers

__all__ = ["Collecting", "replica"]

#: Steps of each environment in one batch of the dry run, at most.
STEPS = 8


@dataclass
class Collecting:
    """A run of a collector on copies.

    Attributes:
        kind: the collector's class.
        options: the user's arguments of it.
        workers: processes or environments it is given; 0 where it takes one environment.
        batches: what it gave, or what was in a copy of the replay buffer at the end.
        random: how many of the batches were drawn at random.
        skipped: arguments that could not be copied, and were left out.
    """

    kind: type
    options: dict[str, Any]
    workers: int
    batches: list[TensorDictBase] = field(default_factory=list)
    random: int = 0
    skipped: list[str] = field(default_factory=list)
    synced: bool = False

    def run(self, policy: Any, trial: Any, env: Any, copies: int, factory: Any, deadline: Deadline) -> None:
        """Collect a few batches.

        Args:
            policy: the user's hooked policy, to which arguments such as ``postproc`` may refer.
            trial: the copy that collects.
            env: the user's environment or its constructor.
            copies: how many environments it steps at once.
            factory: the ``policy_factory``; ``None`` where the policy itself is given.
            deadline: says what is waited for.
        """
        deadline.waiting_for = "a fresh environment for the collector"
        arguments = self._arguments(policy, trial, copies * max(self.workers, 1))
        options = env_options(arguments.pop("create_env_kwargs", None))
        if self.workers:
            made = [functools.partial(fresh_env, env, options)] * self.workers
        else:
            made = fresh_env(env, options)
        name = self.kind.__name__
        what = f"{self.workers} worker{'s' * (self.workers > 1)} of {name}" if self.workers else name
        deadline.waiting_for = f"the start of {what}"
        given = {"policy": trial} if factory is None else {"policy_factory": factory}
        with starting_workers():
            collector = self.kind(made, **given, **arguments)
        try:
            frames = iter(collector)
            for index in range(2 + self.random):
                deadline.waiting_for = f"batch {index} from {what}"
                batch = next(frames, None)  # None as well if it goes to a buffer
                if batch is not None:
                    # Collectors write into the same memory again.
                    self.batches.append(batch.detach().clone())
                if index == 0 and (factory is None or arguments.get("weight_sync_schemes")):
                    deadline.waiting_for = f"{what} to take weights"
                    collector.update_policy_weights_(TensorDict.from_module(trial).data.clone())
                    self.synced = True
            if (buffer := arguments.get("replay_buffer")) is not None:
                self.batches = [buffer[:].clone()]
        except BaseException:
            with contextlib.suppress(Exception):
                collector.shutdown()
            raise
        deadline.waiting_for = f"the end of {what}"
        collector.shutdown()

    def _arguments(self, policy: Any, trial: Any, copies: int) -> dict[str, Any]:
        from torchrl.collectors import Collector, MultiCollector

        arguments: dict[str, Any] = {}
        memo = {id(policy): trial}
        for name, value in self.options.items():
            try:
                arguments[name] = replica(value) if name == "replay_buffer" else copy.deepcopy(value, memo)
            except Exception as error:
                self.skipped.append(f"{name} ({type(error).__name__}: {first_line(error)})")
        asked = arguments.get("frames_per_batch", STEPS * copies)
        asked = sum(asked) if isinstance(asked, (list, tuple)) else asked
        frames = min(-(-asked // copies), STEPS) * copies
        self.random = int((arguments.get("init_random_frames") or 0) > 0)
        if self.random:
            arguments["init_random_frames"] = frames
        arguments |= {"frames_per_batch": frames, "total_frames": frames * (2 + self.random)}
        if arguments.get("trajs_per_batch"):
            # One trajectory is as good as many, and takes as long as it takes.
            arguments |= {"trajs_per_batch": 1, "total_frames": -1}
        if compiles := arguments.pop("compile_policy", None):
            # It is tried by itself, and would use up the number of recompilations that Dynamo allows the class in this
            # process. What it traces in workers is the same with a backend that takes no time.
            if self.workers:
                arguments["compile_policy"] = (compiles if isinstance(compiles, dict) else {}) | {"backend": "eager"}
        if issubclass(self.kind, (Collector, MultiCollector)):
            # TorchRL warns of its next default otherwise; what is missing is a finding of its own.
            arguments.setdefault("auto_register_policy_transforms", False)
        return arguments


def replica(buffer: Any, rows: int = 256) -> Any:
    """A small buffer like another; with its first row if it has one, because that fixes which keys it takes."""
    from torchrl.data import ReplayBuffer

    storage = buffer.storage
    accepted = inspect.signature(type(storage).__init__).parameters
    options = {name: getattr(storage, name) for name in ("ndim", "shared_init", "device") if name in accepted}
    made = ReplayBuffer(storage=type(storage)(rows, **options), shared=buffer.shared, batch_size=1)
    if len(storage):
        made.extend(storage.get(0).detach().clone().unsqueeze(0))
    for transform in copy.deepcopy(buffer.transform):
        made.append_transform(transform)
    return made
