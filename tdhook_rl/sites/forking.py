"""Hooked policies in threads that take turns, in a process that forks, and in processes that were given a copy."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.internals.python_names import is_owned

#: Seconds that a fork waits for calls of other threads to end.
PATIENCE = 2.0

_living: dict[int, weakref.ref[Any]] = {}  # by number, so that a list of it is made in one step
_held: dict[int, list[Any]] = {}  # by the thread that forks


class TurnLock:
    """A lock that a thread may hold several times, and that goes to whoever has waited for it.

    With a plain lock, a thread that takes it again at once (the next chunk, the next step) nearly always gets it.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._next = threading.Lock()  # held by the one whose turn is next

    def acquire(self, timeout: float = -1.0) -> bool:
        if is_owned(self._lock):
            return self._lock.acquire()
        if not self._next.acquire(timeout=timeout):
            return False
        try:
            return self._lock.acquire(timeout=timeout)
        finally:
            self._next.release()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        if is_owned(self._lock):
            self._lock.acquire()
        else:
            with self._next:
                self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def forget_others(self) -> None:
        """In a forked child: the thread that waited is not in this process."""
        self._next = threading.Lock()


class Switch:
    """Whether the hooking is on, readable in the processes that were given a copy before it was switched off.

    The memory is shared from the first copy on; a deep copy is the same switch.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._off = False

    def share(self) -> None:
        """Make the memory that copies will look at."""
        if self._value is None:
            self._value = torch.tensor(not self._off).share_memory_()

    def off(self) -> None:
        self._off = True
        if self._value is not None:
            self._value.fill_(False)

    def on(self) -> bool:
        return not self._off if self._value is None else bool(self._value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return self


def survive_forks(runtime: Any) -> None:
    """Let forks of this process wait for the end of its call, and the child begin with a lock that nobody holds."""
    number = id(runtime)
    _living[number] = weakref.ref(runtime, lambda _: _living.pop(number, None))


def _runtimes() -> list[Any]:
    found = [(number, reference()) for number, reference in list(_living.items())]
    # In one order, so that two threads that fork at once do not wait for each other.
    return [runtime for _, runtime in sorted(found, key=lambda pair: pair[0]) if runtime is not None]


def _before() -> None:
    limit = time.monotonic() + PATIENCE
    held = []
    for runtime in _runtimes():
        runtime.switch.share()
        if runtime.lock.acquire(timeout=max(0.0, limit - time.monotonic())):
            held.append(runtime)
    _held[threading.get_ident()] = held


def _in_parent() -> None:
    for runtime in _held.pop(threading.get_ident(), ()):
        runtime.lock.release()


def _in_child() -> None:
    held = _held.pop(threading.get_ident(), [])
    _held.clear()
    for runtime in _runtimes():
        runtime.away = True
        # Whoever forks in the middle of a call of its own goes on with it; a call of another thread never ends here.
        if runtime in held and runtime.caller == threading.get_ident() and runtime.depth:
            runtime.lock.forget_others()
            runtime.lock.release()
        else:
            runtime.forget_call()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
