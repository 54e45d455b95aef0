"""Setting vectors, probe weights and gates of a hooked policy that a collector is running."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, WorkerError
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.internals.torchrl_names import (
    collects_freely,
    evaluated_policy,
    has_async_pool,
    sent_policy,
    starts_processes,
)
from tdhook_rl.rollout.guarded import Guarded
from tdhook_rl.rollout.workers import Caller, inner_collector, is_ending, workers_of
from tdhook_rl.sites.controls import as_value

#: The path of the method, from a worker's collector on.
_UPDATE = "policy.controls.update_"


@checked
def set_controls(collector: Any, values: Mapping[str, Any], *, timeout: float = 60.0) -> None:
    """Set controls (``"steering.alpha"``, vectors, probe weights) in every copy of the policy that a collector runs.

    Workers that were given the hooked policy share the memory of its controls, and ``policy.controls[...] = value`` is
    all that is needed there. Workers that made a policy of their own (``policy_factory``) and remote ones (Ray) must be
    told; this does what is right for each collector. Steps that a worker takes meanwhile may still see the old values:
    a :class:`~tdhook_rl.latent.ControlRecord` shows in the data what was in force in each row.

    A worker that collects in the background (``start()``) drops the rollout that it is in when it is told.

    Args:
        collector: a collector of TorchRL, an ``Evaluator``, or a :class:`Guarded` one.
        values: by the names in ``policy.controls``; all of them are set, or none if one is refused.
        timeout: seconds in which the workers have to answer.

    Raises:
        MissingKeyError: if there is no such control.
        InputError: if a value has another shape or is not finite; if the collector does not run a hooked policy.
        WorkerError: if the workers cannot be told by this collector, or do not answer.

    Example:
        >>> import torch
        >>> from torchrl.collectors import Collector
        >>> from tdhook_rl import SteeringVectors
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> with SteeringVectors({FC2: torch.ones(64)}, alpha=0.0).prepare(make_actor()) as policy:
        ...     collector = Collector(CueCorners(), policy, frames_per_batch=8, total_frames=16)
        ...     set_controls(collector, {"steering.alpha": 0.5})
        ...     collector.shutdown()
        >>> policy.controls["steering.alpha"]
        tensor(0.5000)
    """
    caller = Caller(type(collector).__name__, lambda: workers_of(collector), lambda: is_ending(collector))
    if isinstance(collector, Guarded):
        caller, collector = collector._caller, collector.collector
    told = {name: as_value(name, value).cpu() for name, value in values.items()}
    outer = type(collector).__name__
    collector = inner_collector(collector)
    here = _policy_here(collector)
    tell = _way_to_workers(collector, told, outer)
    if here is not None:
        here.controls.update_(told)  # refuses what is wrong before a worker hears of it
    elif tell is None:
        raise InputError(f"{outer} runs no hooked policy, so there is nothing to set")
    if tell is not None:
        caller.call("an answer of the workers to set_controls", tell, timeout)


def _policy_here(collector: Any) -> Any:
    """The hooked policy of this process, if there is one: that which is run, or that which was sent to the workers."""
    for policy in (getattr(collector, "policy", None), evaluated_policy(collector), sent_policy(collector)):
        if isinstance(policy, HookedMixin):
            return policy
    return None


def _way_to_workers(collector: Any, told: dict[str, Tensor], outer: str) -> Callable[[], Any] | None:
    """A call that tells the workers; ``None`` where they share the memory of the policy in this process.

    Raises:
        WorkerError: where there are workers with controls of their own, and no way to them.
    """
    if getattr(collector, "closed", False):
        raise WorkerError(f"{outer} has been shut down")
    if hasattr(collector, "remote_collectors"):
        inner = getattr(collector, "collector_class", None)
        if collector.policy is None and starts_processes(inner):
            raise WorkerError(
                f"the workers of {outer} have processes of their own whose policies come from policy_factory: give it "
                "the hooked policy, which these then share on each machine, or collector_class='single'"
            )
        return functools.partial(collector.map_fn, _UPDATE, [(told,)] * len(collector.remote_collectors))
    if hasattr(collector, "procs"):
        if not any(collector.policy_factory):
            return None
        if getattr(collector, "running", False) and not collects_freely(collector):
            raise WorkerError(
                f"{outer} hands out batches while its workers collect the next, and a worker that is told something "
                "then loses its batch and waits for ever: give the collector the hooked policy (policy=) instead of "
                "policy_factory, so that the workers share its controls, or collect in the background with start()"
            )
        return functools.partial(collector.map_fn, _UPDATE, [(told,)] * collector.num_workers)
    if getattr(collector, "server_backend", "thread") != "thread":
        raise WorkerError(
            f"{outer} serves a policy of policy_factory from a process, which takes weights and nothing else: serve "
            "the hooked policy from a thread (policy=, transport='driver')"
        )
    if not hasattr(collector, "iterator"):  # the backend of an evaluator, before its collector is made
        if evaluated_policy(collector) is None:
            raise WorkerError(
                f"{outer} has no policy yet, or has it in an actor of its own: it is made by policy_factory at the "
                "first evaluation; set the controls after it (with backend='thread' or 'process')"
            )
    # (The attribute ``env`` of an AsyncBatchedCollector would start it.)
    elif "env" not in vars(collector) and not has_async_pool(collector):
        raise WorkerError(f"{outer} offers no way to the policies of its workers")
    return None
