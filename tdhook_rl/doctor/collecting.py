"""The collector itself, on copies and for a few frames: what a check finds in its arguments and in what it gave."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer

from tdhook_rl.batches.annotating_mixin import only_by_annotate
from tdhook_rl.batches.keeping import kept_keys
from tdhook_rl.doctor.dry_run import Deadline, copied, env_options, first_line, fresh_env
from tdhook_rl.doctor.findings import Finding
from tdhook_rl.doctor.recorded_rollout import Key, RecordedRollout, as_tuple, leaves
from tdhook_rl.errors import TdhookError, listed
from tdhook_rl.rollout.interrupts import starting_workers

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
        """Collect a few batches with ``trial``, a copy of the policy to which arguments such as ``postproc`` may refer.

        The environment (or its constructor) is made anew, and steps ``copies`` at once; ``factory`` is the
        ``policy_factory``, if the collector is given one in place of the policy.
        """
        deadline.waiting_for = "a fresh environment for the collector"
        arguments = self._arguments(policy, trial, copies * max(self.workers, 1))
        given = arguments.pop("create_env_kwargs", None)
        each = env if isinstance(env, list | tuple) else [env] * self.workers
        if self.workers:
            of = given if isinstance(given, list | tuple) else [given] * self.workers
            made = [functools.partial(fresh_env, *one) for one in zip(each, map(env_options, of), strict=True)]
        else:
            made = fresh_env(env, env_options(given))
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
                arguments[name] = replica(value) if name == "replay_buffer" else copied(value, memo)
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
    storage = buffer.storage
    accepted = inspect.signature(type(storage).__init__).parameters
    options = {name: getattr(storage, name) for name in ("ndim", "shared_init", "device") if name in accepted}
    made = ReplayBuffer(storage=type(storage)(rows, **options), shared=buffer.shared, batch_size=1)
    if len(storage):
        made.extend(storage.get(0).detach().clone().unsqueeze(0))
    for transform in copied(buffer.transform):
        made.append_transform(transform)
    return made


_STORING = "pass storing_device=, such as storing_device='cpu'"


def device_findings(policy: Any, options: dict[str, Any]) -> Iterator[Finding]:
    """Whether the devices are there, and can be stored from.

    TorchRL stacks steps before it stores them. Where the policy's outputs are cast, a nested output has a device
    and what stands beside it has none, which does not stack; results of hooked policies are written without.
    """
    default = options.get("device")
    devices = {name: options.get(name) or default for name in ("policy_device", "env_device", "storing_device")}
    named = [
        device for value in devices.values() for device in (value if isinstance(value, (list, tuple)) else [value])
    ]
    absent = next((device for device in named if device is not None and not _available(torch.device(device))), None)
    if absent is not None:
        yield Finding.error("devices", f"there is no device {str(absent)!r} here", "check on a machine that has it")
        return
    casts = devices["policy_device"] != devices["env_device"]
    nested = [key for key in map(as_tuple, policy.policy_out_keys) if len(key) > 1 and key[0] != "next"]
    if casts and nested and options.get("replay_buffer") is not None and devices["storing_device"] is None:
        yield Finding.error(
            "devices",
            f"the policy's nested output {nested[0]} is cast between policy_device={devices['policy_device']} and "
            f"env_device={devices['env_device']} and goes to a replay buffer, which TorchRL cannot stack",
            _STORING,
        )
        return
    shown = ", ".join(f"{name}={value}" for name, value in devices.items() if value is not None)
    yield Finding.ok("devices", shown or "the policy and the environment stay where they are")


def _available(device: torch.device) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def collecting_findings(run: Collecting, policy: Any, rollout: RecordedRollout) -> Iterator[Finding]:
    """Which results the collector kept, and whether they were computed and changed."""
    if not run.batches:
        yield Finding.error("collector", f"{run.kind.__name__} gave nothing", "a batch must come within a few steps")
        return
    if run.skipped:
        yield Finding.warning(
            "collector",
            f"tried without arguments that do not deep-copy: {'; '.join(run.skipped)}",
            "a dry run must not use yours: check with arguments that copy, or take what is said here without them",
        )
    yield Finding.ok(
        "collector",
        f"{run.kind.__name__} ran"
        + (f" with {run.workers} worker{'s' * (run.workers > 1)}" if run.workers else "")
        + (", and took weights" if run.synced else ""),
    )
    buffered = run.options.get("replay_buffer") is not None
    expected = set(rollout.results)
    postproc, kept = run.options.get("postproc"), {as_tuple(key) for key in policy.result_keys}
    if getattr(getattr(postproc, "func", postproc), "__self__", None) is policy:
        kept = {*kept_keys(policy, getattr(postproc, "keywords", {}).get("keep"))}
        expected = kept
    last = run.batches[-1]
    lost = sorted(expected - {key for key, _ in leaves(last)})
    if lost:
        names = ", ".join(map(repr, lost))
        where = "the replay buffer" if buffered else "the batch"
        yield Finding.error("kept", f"{where} lacks {names}", _why_lost(run, rollout, lost))
    else:
        yield Finding.ok("kept", f"{'the replay buffer' if buffered else 'the batch'} holds every result")
    held = {key for key, _ in leaves(last)}
    lacking = [key for key in map(as_tuple, only_by_annotate(policy)) if key in kept and key not in held]
    if lacking and not lost:
        # Where nothing was said of the collector, it may be called in the loop as well.
        yield Finding(
            "annotate",
            "warning" if run.options else "ok",
            f"{listed(map(repr, lacking), 4)} {'is' if len(lacking) == 1 else 'are'} written by annotate only, which "
            "the collector does not call",
            "pass postproc=policy.annotate, call policy.annotate(batch) in your loop, or prepare with when='step'",
        )
    # A buffer counts elements, which may be trajectories: random frames can then outlast the dry run.
    if not (buffered and run.random):
        yield from _computed(run, rollout, expected - set(lost))
    if not buffered:
        yield from _random(run, rollout)
        yield from _frozen(run, rollout)


def _why_lost(run: Collecting, rollout: RecordedRollout, lost: list[Key]) -> str:
    buffer = run.options.get("replay_buffer")
    if buffer is None:
        return "look for what selects keys: a postproc, or a policy wrapped around the hooked one"
    if len(buffer.storage):
        return (
            "its rows from before fixed its keys: start a new buffer, or write the results beside it with "
            "tdhook_rl.replay.analyze"
        )
    if len(buffer.transform):
        return "a transform of the buffer drops them, such as SelectKeys: add them to it"
    if run.workers and not set(lost) & set(rollout.results):
        return (
            "workers add them after the storage has fixed its keys: use LazyTensorStorage(..., shared_init=True), or "
            "when='step'"
        )
    return "write the results beside the buffer with tdhook_rl.replay.analyze"


def _computed(run: Collecting, rollout: RecordedRollout, kept: set[Key]) -> Iterator[Finding]:
    rows = rollout.steps * rollout.env.batch_size.numel()
    for key in sorted(kept):
        if key[0] != "computed" or rollout.selected.get(key[1], rows) < rows:
            continue  # a schedule may well leave out the few steps of a dry run
        masks = [batch.get(key, None) for batch in run.batches[run.random :] or run.batches]
        if not any(mask is not None and bool(mask.any()) for mask in masks):
            yield Finding.error(
                "schedules",
                f"no row of {key[1]!r} was computed in the batches of the collector",
                "look for what clears the mask, such as a postproc",
            )


def _random(run: Collecting, rollout: RecordedRollout) -> Iterator[Finding]:
    if not run.random:
        return
    first = {key for key, _ in leaves(run.batches[0])}
    absent = [key for key in rollout.results if key not in first]
    if absent:
        yield Finding.warning(
            "random frames",
            f"the batches of init_random_frames lack {absent[0]}",
            "leave use_buffers as it is, fill them in with postproc=policy.annotate, or read with data.get(key, None)",
        )
    else:
        yield Finding.ok("random frames", "their rows are zero, and masked as not computed")


def _frozen(run: Collecting, rollout: RecordedRollout) -> Iterator[Finding]:
    if len(run.batches) < 2:
        return
    first, second = run.batches[-2:]
    inputs = [key for key in map(as_tuple, rollout.policy.policy_in_keys) if first.get(key, None) is not None]
    if all(torch.equal(first.get(key), second.get(key)) for key in inputs):
        return
    own = {as_tuple(key) for key in rollout.policy.policy_out_keys}.union(*rollout.env_keys)
    # Results that do not change from step to step either are a finding of the rollout.
    same = {key for key in rollout.results if key[0] == "computed"} | own
    for key, value in sorted(leaves(first), key=lambda item: item[0]):
        if key in same or key[0] in ("collector", "computed") or not value.is_floating_point():
            continue
        other = second.get(key, None)
        if (
            other is not None
            and value.shape == other.shape
            and torch.equal(value, other)
            and not _one_row(value, first)
        ):
            yield Finding.error(
                "frozen",
                f"{key} is the same in two batches, while the inputs differ",
                "a hook that sets new keys in a worker is read once: use postproc=, or declare the key in out_keys",
            )


def _one_row(value: torch.Tensor, data: TensorDictBase) -> bool:
    """Whether all rows are equal, as the gradient of a linear network is: then two batches may well be."""
    rows = value.flatten(0, data.ndim - 1)
    return bool((rows == rows[0]).all())


def failure(error: Exception, where: str, options: dict[str, Any]) -> Finding:
    """The finding for an error that stopped a dry run, with the remedy of what is known to cause it."""
    if isinstance(error, TdhookError):
        return Finding.error("dry run", f"{where}: {error}")
    text = f"{type(error).__name__}: {error}"
    seen = f"{where}: {type(error).__name__}: {first_line(error)}"
    if (cause := error.__cause__) is not None:
        seen += f" (because of {type(cause).__name__}: {first_line(cause)})"
    return Finding.error("dry run", seen, _remedy(text, options))


def _remedy(text: str, options: dict[str, Any]) -> str:
    known = (
        (("devices differ",), f"a nested entry is cast before it is stacked: {_STORING}"),
        (("expects each tensor to be equal size",), "an entry changes its shape between steps: pad it to one shape"),
        (("got NoneType",), "an entry is absent at the first step: write it at every step, from the reset on"),
        (("pickle", "serialize"), "build and prepare the policy inside a function, given as policy_factory="),
        (
            ("bootstrapping phase", "failed to initialize", "closed the connection", "process failed"),
            "read the worker's traceback above; a script that starts workers needs `if __name__ == '__main__':`",
        ),
    )
    for parts, remedy in known:
        if any(part in text for part in parts):
            return remedy
    if "KeyError" in text and options.get("replay_buffer") is not None:
        return (
            "the first rows of a buffer fix its keys: start an empty one, and do without init_random_frames or fill "
            "their results in with postproc=policy.annotate"
        )
    return "run the same with the policy as it was before prepare(): if that fails too, the cause is not the hooks"
