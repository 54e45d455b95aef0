"""A collector whose calls have a time limit, and end when one of its workers does."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torch import nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import InputError, WorkerError, nearest
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.internals.torchrl_names import (
    actor_id,
    background_error,
    background_thread,
    env_backend,
    evaluated_policy,
    evaluates_by_workers,
    frames_so_far,
    weight_queues,
    weight_schemes,
)
from tdhook_rl.rollout.workers import Caller, Worker, descendants, end, inner_collector, is_ending, workers_of

#: Methods of collectors and evaluators that wait for workers.
_WAITING = ("evaluate", "get_distant_attr", "load_state_dict", "map_fn", "reset", "set_seed", "state_dict", "wait")
_END = object()


class Guarded:
    """Use a collector or an ``Evaluator`` through this, and a worker that dies or hangs is an error, not a wait.

    TorchRL notices a dead worker while it waits for a batch. It waits for ever where weights are sent to one, or in a
    form that the workers cannot read; and nobody notices one while collection runs in the background (``start()``).
    Here each of these is a :class:`~tdhook_rl.errors.WorkerError` (or an ``InputError``) within ``timeout``. Before it
    is raised, all workers are ended, with the processes that they have started. Whether the hooked policy and the
    user's still share their tensors is looked at before each batch, also for workers, which cannot look themselves.

    The attributes of the collector are at hand here. Calls of collectors with workers are made on a thread of the
    guard; those of others where the caller is, and without a limit, for there is nobody else to wait for.

    Args:
        collector: any collector of TorchRL, or an ``Evaluator``.
        timeout: seconds that a batch, or one exchange with the workers, may take.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> collector = Collector(CueCorners(), make_actor(), frames_per_batch=8, total_frames=16)
        >>> with Guarded(collector, timeout=60) as guarded:
        ...     [data.shape for data in guarded]
        [torch.Size([8]), torch.Size([8])]
    """

    @checked
    def __init__(self, collector: Any, *, timeout: float = 300.0) -> None:
        if isinstance(collector, type) or not hasattr(collector, "shutdown"):
            got = collector.__name__ if isinstance(collector, type) else type(collector).__name__
            raise InputError(f"Guarded takes a collector of TorchRL that has been made, got {got}")
        if not timeout > 0:
            raise InputError(f"timeout= is a number of seconds above 0, got {timeout!r}")
        self.collector = collector
        self.timeout = timeout
        self._name = type(collector).__name__
        self._actors = list(getattr(collector, "remote_collectors", ()))
        self._known: dict[int, Worker] = {}
        self._children: set[tuple[int, str]] = set()
        self._caller = Caller(
            self._name, lambda: workers_of(self.collector), lambda: self._closed or is_ending(self.collector)
        )
        self._closed = False
        self._left_at: list[InteractionType | None] = []  # the exploration type when a call was left waiting
        self._note_workers()

    def __iter__(self) -> Iterator[TensorDictBase | None]:
        iterator = iter(self.collector)
        while True:
            self._check_tie()
            data = self._call("a batch", functools.partial(next, iterator, _END))
            if data is _END:
                return
            self._note_workers()
            yield data

    def update_policy_weights_(self, policy_or_weights: Any = None, **options: Any) -> None:
        """As the collector's; a ``state_dict`` and a module are accepted by every collector.

        Raises:
            InputError: if the policy has no such weights.
            TieError: if the user's policy was given other tensors since it was prepared.
            WorkerError: if a worker does not acknowledge them.
        """
        self._check_tie()
        for name in ("weights", "policy"):
            policy_or_weights = options.pop(name, None) if policy_or_weights is None else policy_or_weights
        weights = policy_or_weights
        if weights is not None and options.get("model_id", "policy") == "policy":
            weights = self._readable(weights)
        self._call(
            "an acknowledgement of new weights",
            functools.partial(self.collector.update_policy_weights_, weights, **options),
        )

    def check(self) -> None:
        """Raise :class:`WorkerError` if a worker or background collection has ended: to be called beside ``start``."""
        try:
            self._caller.check()
            self._check_background()
        except WorkerError:
            self._give_up()
            raise

    def shutdown(self, timeout: float = 10.0) -> None:
        """End the collector and its workers; nothing of them is left after at most about twice ``timeout``."""
        if self._closed:
            return
        self._closed = True
        error = self._shut(timeout)
        self._restore_exploration()
        if error is not None:
            raise error

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self.shutdown()

    def __getattr__(self, name: str) -> Any:
        if name == "collector":  # not there yet, or never: a copy that was not initialised
            raise AttributeError(name)
        found = getattr(self.collector, name)
        if name in _WAITING and callable(found):
            return functools.partial(self._bounded, name, found)
        return found

    # ------------------------------------------------------------------ calls

    def _bounded(self, name: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self._call(f"the result of {name}()", functools.partial(method, *args, **options))

    def _call(self, what: str, function: Callable[[], Any]) -> Any:
        if self._runs_here():
            return function()
        exploration = interaction_type()
        try:
            return self._caller.call(what, function, self.timeout)
        except WorkerError:
            self._left_at.append(exploration)
            self._give_up()
            raise
        except Exception as error:
            index = self._dead_actor(error)
            if index is None:
                raise
            self._give_up()
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"remote worker {index} of {self._name} died ({reason}); the collector cannot go on without it"
            ) from error
        except BaseException:  # Ctrl-C, which leaves the waiting thread in the middle of a rollout
            self._left_at.append(exploration)
            raise

    def _runs_here(self) -> bool:
        """Whether nothing of the collector is in another process."""
        collector = inner_collector(self.collector)
        return not (
            self._actors
            or hasattr(collector, "procs")
            or evaluates_by_workers(collector)
            or env_backend(collector) != "threading"
            or getattr(collector, "server_backend", "thread") != "thread"
            or workers_of(collector)
        )

    def _dead_actor(self, error: Exception) -> int | None:
        actor = getattr(error, "actor_id", None)
        found = [actor_id(one) == actor for one in self._actors]
        return found.index(True) if actor is not None and any(found) else None

    # ------------------------------------------------------------------ what is looked at

    def _note_workers(self) -> None:
        """Remember the workers and what they started: afterwards nobody can tell whose a process was."""
        found = {worker.pid: worker for worker in workers_of(self.collector)}
        if found.keys() - self._known.keys():
            self._known |= found
            self._children |= descendants(found)

    def _check_tie(self) -> None:
        policy = _policy(self.collector)
        if isinstance(policy, HookedMixin) and policy._hooked.tie is not None:
            policy._hooked.tie.check(policy)

    def _check_background(self) -> None:
        collector = self.collector
        error = background_error(collector)
        thread = background_thread(collector)
        frames = frames_so_far(collector)
        total = getattr(collector, "total_frames", None)
        complete = total is not None and 0 <= total <= frames
        ended = thread is not None and not thread.is_alive() and not self._closed and not complete
        if error is not None or ended:
            reason = "its traceback went to standard error" if error is None else repr(error)
            raise WorkerError(
                f"the collection of {self._name} in the background ended after {frames} frames: {reason}"
            ) from error

    def _readable(self, weights: Any) -> Any:
        """Weights in a form that every collector reads; raise if the policy has no such entries."""
        if isinstance(weights, Mapping) and not isinstance(weights, TensorDictBase):
            if all(isinstance(key, int) for key in weights):
                return {worker: self._readable(one) for worker, one in weights.items()}
            weights = TensorDict(dict(weights))
            weights = weights.unflatten_keys(".") if any("." in key for key in weights.keys()) else weights
        given = TensorDict.from_module(weights) if isinstance(weights, nn.Module) else weights
        policy = _policy(self.collector)
        if isinstance(policy, nn.Module) and isinstance(given, TensorDictBase):
            _compare(given, TensorDict.from_module(policy), whole=bool(self._actors))
        # A collector without workers cannot read modules.
        return weights if hasattr(self.collector, "procs") else given

    # ------------------------------------------------------------------ the end

    def _give_up(self) -> None:
        if not self._closed:
            self._closed = True
            end([*self._known.values(), *workers_of(self.collector)], self._children)
            self._shut(5.0)
        self._restore_exploration()

    def _restore_exploration(self) -> None:
        """The exploration type is one for all threads; a thread that was left waiting has set it for its rollout."""
        if self._left_at:
            set_interaction_type(self._left_at[0]).__enter__()
            self._left_at.clear()

    def _shut(self, timeout: float) -> BaseException | None:
        """Shut down in a bounded time; returns the collector's own error."""
        schemes = weight_schemes(inner_collector(self.collector))
        for queue in weight_queues(schemes):
            queue.cancel_join_thread()  # what was put for a dead worker would be waited for at exit
        errors: list[BaseException] = []

        def shut() -> None:
            collector = self.collector
            try:
                if getattr(collector, "is_running", bool)():
                    collector.async_shutdown(timeout=timeout)
                else:
                    collector.shutdown(timeout=timeout)
                # TorchRL leaves this to the end of the program, where the threads that it needs cannot start.
                for scheme in schemes:
                    scheme.shutdown()
            except Exception as error:
                errors.append(error)

        if self._runs_here():
            shut()
        else:
            thread = threading.Thread(target=shut, name=f"shutdown of {self._name}", daemon=True)
            thread.start()
            thread.join(timeout + 2.0)
        end([*self._known.values(), *workers_of(self.collector)], self._children)
        for actor in self._actors:
            with contextlib.suppress(Exception):
                import ray

                ray.kill(actor, no_restart=True)
        return errors[0] if errors else None


def _policy(collector: Any) -> Any:
    collector = inner_collector(collector)
    policy = getattr(collector, "policy", None)
    return evaluated_policy(collector) if policy is None else policy


def _compare(given: TensorDictBase, own: TensorDictBase, whole: bool) -> None:
    names, shapes = (
        {".".join(key_parts(key)): value.shape for key, value in one.items(True, True)} for one in (given, own)
    )
    unknown = [name for name in names if name not in shapes and not name.startswith("__extra_state__")]
    if unknown:
        raise InputError(
            f"update_policy_weights_ was given {unknown[0]!r}, which the policy does not have; "
            f"{nearest(unknown[0], shapes)}"
        )
    wrong = next((name for name, shape in names.items() if name in shapes and shape != shapes[name]), None)
    if wrong is not None:
        raise InputError(
            f"update_policy_weights_ was given {wrong!r} of shape {tuple(names[wrong])}; the policy's has "
            f"{tuple(shapes[wrong])}"
        )
    absent = [name for name in shapes if name not in names]
    if whole and absent:
        raise InputError(f"remote workers read the whole of the weights, but {absent[0]!r} is absent")
