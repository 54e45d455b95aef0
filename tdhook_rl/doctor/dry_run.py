"""What a dry run needs: copies that may be run, time that ends, and generators that are left as they were."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict.nn import set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torch import nn
from torch.nn.parameter import is_lazy
from torchrl.envs import EnvBase, ParallelEnv

from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import held_parameters
from tdhook_rl.latent.caches import CacheStore, Staging
from tdhook_rl.policies.rebinding import deep_copy

T = TypeVar("T")

#: Seconds in which a thread that waited for workers ends after they were stopped.
GRACE = 10.0


class TimeUp(Exception):
    """The time of a check ended while it waited for something."""


class Deadline:
    """Runs what may hang in a thread of its own, within a time that all of it shares.

    Attributes:
        waiting_for: what is being run, in words; the runs keep it up to date.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waiting_for = "the start"
        self._end = time.monotonic() + seconds
        self._before = set(multiprocessing.active_children())

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.monotonic())

    def run(self, function: Callable[[], T]) -> T:
        """Call a function; if it fails or does not end in time, processes started since are stopped.

        Raises:
            TimeUp: naming what was waited for.
        """
        outcome: list[tuple[Any, BaseException | None]] = []
        # The default device belongs to a thread; the exploration type is one for all.
        device, exploration = torch.get_default_device(), interaction_type()

        def target() -> None:
            try:
                with nullcontext() if device.type == "cpu" else device:
                    outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=target, name="tdhook_rl.rollout.check", daemon=True)
        waited_for = None
        thread.start()
        try:
            thread.join(self.left)
            waited_for = self.waiting_for if thread.is_alive() else None
        finally:
            # Also when Ctrl-C ended the waiting, or when one worker failed and another waits for it.
            if not outcome or outcome[0][1] is not None:
                started = set(multiprocessing.active_children()) - self._before
                for process in started:
                    process.kill()
                    process.join(GRACE)
                if started:
                    thread.join(GRACE)  # it waited for them, and fails now
            if thread.is_alive():  # it is left in its rollout, for which it has set the exploration type
                set_interaction_type(exploration).__enter__()
                _end(thread)
        if waited_for is not None:
            raise TimeUp(waited_for)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


def _end(thread: threading.Thread) -> None:
    """Let a thread end where it next comes to run Python code.

    Whatever it waits for, it would go on in the user's program later, and draw from the generators that training draws
    from. Code that catches exceptions lets this one pass.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give torch, NumPy and Python their generator states back, and torch its number of threads."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads = torch.get_num_threads()  # a collector with workers changes it
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def trial_copy(policy: Any) -> Any:
    """A copy of a hooked policy with weights of its own, which may be run: nothing reaches the user's objects."""
    trial = deep_copy(policy)
    trial._hooked.runtime.checked = False  # look again for interventions that do not act
    # Methods that feed the user's probes share them with copies of the policy, on purpose; a dry run must not.
    # So it is with a cache of the caller's, which the hooks reach through a route.
    shadows = {id(one): _shadow(one) for one in trial._hooked.bound if one.consumes and one.store is None}
    stores: dict[int, CacheStore] = {}
    for route in trial._hooked.routes:
        if isinstance(route, Staging):
            held = route.store.data
            own = CacheStore(held.clone().lock_() if held.is_locked else held.clone())
            route.store = stores.setdefault(id(route.store), own)
    state = trial._hooked
    for methods in (state.bound, state.steps, state.alone):
        methods[:] = [shadows.get(id(one), one) for one in methods]
    return trial


def _shadow(bound: Any) -> Any:
    shadow = object.__new__(type(bound))
    shadow.__dict__.update(copy.deepcopy(bound.__dict__))
    return shadow


def copied(thing: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy, in which what has no shape before its first use (the frames of ``CatFrames``) has none either."""
    memo = {} if memo is None else memo
    for part in thing.modules() if isinstance(thing, nn.Module) else ():
        for tensor in (*part._buffers.values(), *part._parameters.values()):
            if tensor is not None and is_lazy(tensor):
                memo[id(tensor)] = type(tensor)(device=tensor.device, dtype=tensor.dtype)  # type: ignore[call-arg]
    return copy.deepcopy(thing, memo)


def fresh_env(env: Any, options: dict[str, Any]) -> Any:
    """An environment that may be stepped: a copy of an instance, or what a constructor makes.

    Raises:
        InputError: if the instance does not deep-copy, or the constructor makes something else.
    """
    if isinstance(env, EnvBase):
        if any(isinstance(part, ParallelEnv) and not part.is_closed for part in env.modules()):
            # Half a copy of it would close its workers when it is deleted.
            raise InputError(
                "this ParallelEnv has started its workers, and a dry run must not step them: give a function that "
                "makes another, or one that has not been reset"
            )
        try:
            return copied(env)
        except Exception as error:
            raise InputError(
                f"this {type(env).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}), and a dry "
                "run must not step yours: give a function that makes one"
            ) from error
    made = env(**options)
    if not isinstance(made, EnvBase):
        raise InputError(f"the environment constructor returned a {type(made).__name__}, not a TorchRL environment")
    return made


def env_options(given: Any) -> dict[str, Any]:
    """The arguments of the environment's constructor: ``create_env_kwargs``, or the first of several."""
    options = given[0] if isinstance(given, (list, tuple)) and given else given
    return dict(options or {})


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:300]}..."


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's parameters are; ``None`` if it has none."""
    return next((one.device for one in held_parameters(module).values() if not one.is_meta), None)
