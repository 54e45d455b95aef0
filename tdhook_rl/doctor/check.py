"""The doctor: one call that says whether a hooked policy will do in a collector what it was configured to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.utils import get_env_transforms_from_module

from tdhook_rl.arguments.checked import checked
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.doctor.collecting import Collecting, collecting_findings, device_findings, failure
from tdhook_rl.doctor.dry_run import Deadline, TimeUp, env_options, fresh_env, generators_kept, trial_copy
from tdhook_rl.doctor.findings import Finding, Report
from tdhook_rl.doctor.policy_checks import compile_findings, policy_findings
from tdhook_rl.doctor.recorded_rollout import RecordedRollout
from tdhook_rl.doctor.rollout_checks import batch_findings, collision_findings, input_findings, rollout_findings
from tdhook_rl.errors import InputError
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.method import HookingContext
from tdhook_rl.runs.site_table import site_table


@checked
def check(
    policy: Any,
    env: Any,
    collector_kwargs: Mapping[str, Any] | None = None,
    *,
    collector: type | None = None,
    steps: int = 16,
    compile: bool = False,
    time_limit: float = 120.0,
) -> Report:
    """Try a hooked policy in an environment and a collector, and say what would fail or go wrong in silence.

    Everything runs on copies: of the policy (with weights of its own), of the environment, of the replay buffer's
    first row, and of the other arguments. Parameters, generators and the state of the environment are afterwards what
    they were. Functions among the arguments, and steering functions, are called.

    Args:
        policy: the hooked policy; or the context that ``prepare`` returned; or a function without arguments that
            returns a hooked policy, as for ``policy_factory``.
        env: a TorchRL environment, which must deep-copy, or a function that makes one; or a list of these, one for
            each worker, of which the first is looked at step by step.
        collector_kwargs: the arguments for the collector, without the policy and the environment; ``num_workers`` of
            them, or ``num_collectors`` (with ``sync``), makes the dry run start so many processes. Frames and the size
            of the buffer are cut down.
        collector: the collector's class; by default ``Collector``, or ``MultiSyncCollector`` if there are workers.
        steps: how many steps are made by hand; more, up to one batch of the collector, if a schedule has not selected
            a row by then.
        compile: compile as well, with a backend that only traces; implied by ``compile_policy``.
        time_limit: seconds after which the check ends, whatever it waits for. Workers are stopped; what hangs in this
            process cannot be, and is left in a thread of its own.

    Returns:
        a :class:`Report`: ``str(report)`` is a table, ``report.ok`` says that there is no error, and
        ``report.raise_if_failed()`` raises if there is one.

    Raises:
        InputError: if the policy is not hooked.

    What collectors do to keys, and where it is seen here:

    - undeclared keys are dropped with buffers, other devices and workers: ``keys``. Results are declared by
      construction;
    - a key that is not written at every step is repeated or stops the collector: ``keys`` and
      ``environment keys``. Results are written at every step by construction, masked where not computed:
      ``schedules``;
    - a key that appears later is dropped: ``environment keys``, and for buffers with rows ``kept``;
    - rows of ``init_random_frames`` hold zeros, or no results: ``random frames``, ``kept``;
    - shapes that vary do not stack: ``shapes``;
    - names with an underscore are stripped: ``names``; refused by ``prepare`` for results;
    - nested outputs, cast between devices, do not go to a buffer without ``storing_device``: ``devices``; results
      carry no device, by construction;
    - what a hook or ``postproc`` adds in a worker is read once, or dropped: ``frozen``, ``kept``;
    - steering that changes within a batch cannot be seen beforehand.

    Example:
        >>> from tdhook_rl import ActivationCaching
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> actor = make_actor()
        >>> with ActivationCaching(FC2).prepare(actor) as policy:
        ...     report = check(policy, CueCorners(batch_size=[2]), {"frames_per_batch": 64})
        >>> report.ok, len(report.of_level("warning"))
        (True, 0)
    """
    if steps < 2:
        raise InputError(f"steps={steps}: at least two are needed, to see what changes between them")
    with generators_kept(), _entered(policy) as (hooked, factory):
        examination = _Examination(
            hooked,
            factory,
            env,
            dict({} if collector_kwargs is None else collector_kwargs),
            collector,
            steps,
            compile,
            Deadline(time_limit),
        )
        return Report(tuple(examination.findings()))


@dataclass
class _Examination:
    policy: Any
    factory: Callable[[], Any] | None
    env: Any
    options: dict[str, Any]
    collector: type | None
    steps: int
    compile: bool
    deadline: Deadline

    def findings(self) -> Iterator[Finding]:
        if not self.policy._hooked.runtime.active:
            yield Finding.error(
                "active",
                "the policy is no longer hooked: its context has ended",
                "check inside the `with` block, or prepare with return_context=False",
            )
            return
        kind, workers = self._collector()
        static = list(
            policy_findings(self.policy, in_processes="num_workers" in _parameters(kind), factory=self.factory)
        )
        yield from static
        if any(one.level == "error" and one.check in ("deepcopy", "recurrent") for one in static):
            yield Finding.warning("dry run", "nothing was run, because of the above")
            return
        try:
            yield from self._run(kind, workers)
        except TimeUp as error:
            yield Finding.error(
                "time limit",
                f"after {self.deadline.seconds:g} s the check still waited for {error}",
                "look at what it waited for; if it is only slow, pass a longer time_limit=",
            )

    def _collector(self) -> tuple[type, int]:
        """The collector's class, and how many environments it is given in a list; 0 for one environment."""
        from torchrl.collectors import AsyncBatchedCollector, Collector, MultiCollector, MultiSyncCollector

        chosen, asked = self._chosen()
        several = isinstance(self.env, list | tuple)
        if several:
            asked = len(self.env) if asked is None else asked
            if not self.env or asked != len(self.env):
                raise InputError(f"each of num_workers={asked} has an environment of its own, got {len(self.env)}")
        if asked is not None and (not isinstance(asked, int) or asked < 0):
            raise InputError(f"num_workers= is a number of processes from 0 on, got {asked!r:.80}")
        kind = chosen or (MultiSyncCollector if asked else Collector)
        takes_a_list = issubclass(kind, (MultiCollector, AsyncBatchedCollector))
        if asked and not takes_a_list:
            remedy = "give one environment" if several else "leave out num_workers"
            raise InputError(f"{kind.__name__} has no workers: {remedy}, or give a MultiSyncCollector")
        workers = (asked or 1) if takes_a_list else 0
        given = self.options.get("create_env_kwargs")
        if isinstance(given, list | tuple) and workers and len(given) != workers:
            raise InputError(f"each of {workers} workers has create_env_kwargs of its own, got {len(given)}")
        return kind, workers

    def _chosen(self) -> tuple[type | None, Any]:
        """The class and the number of workers, as arguments say: of ours, or as ``Collector(...)`` is told of them."""
        from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
        from torchrl.collectors.distributed import DistributedCollector

        asked, backend = self.options.pop("num_workers", None), self.options.get("backend")
        count = self.options.get("num_collectors")
        if self.collector not in (None, Collector) or asked is not None or (backend or count) in (None, "direct"):
            return self.collector, asked
        told = [self.options.pop(name, None) for name in ("backend", "num_collectors", "sync", "backend_options")]
        if backend in (None, "process"):
            self.options |= told[-1] or {}
            return MultiSyncCollector if told[2] else MultiAsyncCollector, count
        self.env = self.env[0] if isinstance(self.env, list | tuple) and self.env else self.env
        return DistributedCollector, None

    def _run(self, kind: type, workers: int) -> Iterator[Finding]:
        self.deadline.waiting_for = "the constructor of the environment"
        first = self.env[0] if isinstance(self.env, list | tuple) else self.env
        env, failed = self._attempt(lambda: fresh_env(first, env_options(self.options.get("create_env_kwargs"))))
        if failed is not None:
            yield failed
            return
        rollout = RecordedRollout(trial_copy(self.policy), env)
        complete = yield from self._roll_out(rollout)
        self.deadline.waiting_for = "the environment to close"
        self._attempt(lambda: rollout.env.close(raise_if_closed=False))
        if rollout.data:
            yield from self._modules(rollout)
        devices = list(device_findings(self.policy, self.options))
        yield from devices
        if not complete:
            yield Finding.warning("collector", "not tried, because of the above")
            return
        if any(one.level == "error" for one in devices):
            yield Finding.warning("collector", "not tried, because of the devices")
        else:
            yield from self._collect(kind, workers, rollout)
        compile_policy = self.options.get("compile_policy")
        if self.compile or compile_policy:
            fullgraph = isinstance(compile_policy, dict) and bool(compile_policy.get("fullgraph"))
            yield from self._compile(rollout, fullgraph)

    def _roll_out(self, rollout: RecordedRollout) -> Generator[Finding, None, bool]:
        """Findings of a rollout by hand; returns whether it went to its end."""
        data, failed = self._attempt(lambda: rollout.reset(self.deadline))
        if failed is None and rollout.missing and self.options.get("auto_register_policy_transforms"):
            rollout.env = rollout.env.append_transform(get_env_transforms_from_module(rollout.policy))
            data, failed = self._attempt(lambda: rollout.reset(self.deadline))
        if failed is not None:
            yield failed
            return False
        first = [*input_findings(rollout), *collision_findings(rollout, data)]
        yield from first
        if any(one.level == "error" for one in first):
            return False
        batch = self.options.get("frames_per_batch", 0)
        frames = sum(batch) if isinstance(batch, (list, tuple)) else batch
        kind = self.options.get("exploration_type") or ExplorationType.RANDOM

        def steps() -> None:
            with torch.no_grad(), set_exploration_type(kind):
                rollout.run(data, self.deadline, self.steps, longer=-(-frames // rollout.env.batch_size.numel()))

        _, failed = self._attempt(steps)
        found = list(rollout_findings(rollout))
        yield from found
        if failed is not None:
            yield failed
            return False
        if any(one.level == "error" and one.check in ("keys", "shapes") for one in found):
            return True
        self.deadline.waiting_for = "annotate() of what was collected"
        stored = rollout.batch()
        # Where interventions acted is no result that is computed again, but what results are computed by.
        acted = {record.key[0] for record in rollout.policy._hooked.records}
        again = [
            key for key in rollout.results if key[0] not in acted and not (key[0] == "computed" and key[1] in acted)
        ]
        annotated, failed = self._attempt(lambda: rollout.policy.annotate(stored.exclude(*again), on_mismatch="ignore"))
        if failed is None:
            yield from batch_findings(rollout, stored, annotated)
        else:
            yield failed
        return True

    def _modules(self, rollout: RecordedRollout) -> Iterator[Finding]:
        """The head of the table of modules."""
        self.deadline.waiting_for = "a call that lists the modules"
        table, failed = self._attempt(lambda: site_table(rollout.policy, rollout.given()))
        if failed is not None:
            yield failed
            return
        ran = [row for row in table if row.runs]
        repeated = [f"{row.path!r} {row.runs} times" for row in ran if row.runs > 1 and row.same_as is None]
        first = ", ".join(
            f"{row.path!r} {row.kind} {'x'.join(map(str, row.features or ()))}".rstrip() for row in ran[:5]
        )
        often = f"; more than once: {', '.join(repeated[:5])}" if repeated else ""
        yield Finding.ok("modules", f"{len(ran)} of {len(table)} run, the first {first}{often}; all: sites(data)")

    def _collect(self, kind: type, workers: int, rollout: RecordedRollout) -> Iterator[Finding]:
        if kind.__module__.startswith("torchrl.collectors.distributed"):
            yield Finding.warning(
                "collector",
                f"{kind.__name__} is not tried: it needs machines of its own",
                "what is said here of keys, shapes and pickling holds for it",
            )
            return
        run = Collecting(kind, self.options, workers)
        copies = rollout.env.batch_size.numel()
        _, failed = self._attempt(
            lambda: run.run(self.policy, trial_copy(self.policy), self.env, copies, self.factory, self.deadline)
        )
        if failed is None:
            yield from collecting_findings(run, self.policy, rollout)
        else:
            yield failed

    def _compile(self, rollout: RecordedRollout, fullgraph: bool) -> Iterator[Finding]:
        def compiled() -> list[Finding]:
            with torch.no_grad():
                return list(compile_findings(self.policy, rollout.given(), self.deadline, fullgraph=fullgraph))

        found, failed = self._attempt(compiled)
        yield from [failed] if failed is not None else found

    def _attempt(self, function: Callable[[], Any]) -> tuple[Any, Finding | None]:
        """What a function returns, or the finding for its error."""
        try:
            return self.deadline.run(function), None
        except TimeUp:
            raise
        except Exception as error:
            return None, failure(error, self.deadline.waiting_for, self.options)


def _parameters(kind: type) -> Mapping[str, Any]:
    return inspect.signature(kind.__init__).parameters


@contextmanager
def _entered(policy: Any) -> Iterator[tuple[Any, Callable[[], Any] | None]]:
    """The hooked policy, and the function that makes it if there is one."""
    if isinstance(policy, HookingContext):
        with policy as hooked:
            yield hooked, None
        return
    if isinstance(policy, type):
        require_hooked(policy, "check()")
    factory = policy if callable(policy) and not isinstance(policy, nn.Module) else None
    made = policy if factory is None else factory()
    if not isinstance(made, HookedMixin):
        inner = (
            [path for path, child in made.named_modules() if isinstance(child, HookedMixin)]
            if isinstance(made, nn.Module)
            else []
        )
        hint = (
            f"its module {inner[0]!r} is: prepare the outermost module, exploration included"
            if inner
            else "give what `with method.prepare(policy) as hooked` gives"
        )
        raise InputError(f"check() takes a hooked policy, and this {type(made).__name__} is not one; {hint}")
    yield made, factory
