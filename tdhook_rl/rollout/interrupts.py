"""Stopping a training loop by Ctrl-C between two batches, where everything can be shut down in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any


class Interruptible:
    """While entered, the first Ctrl-C is remembered and raised by :meth:`check`; the second acts at once.

    An interrupt in the middle of a loss is lost in TorchRL's functional calls, whose exit handling raises an
    error of its own, and it reaches the workers before the collector can shut them down.

    Example:
        >>> with Interruptible() as interruptible:
        ...     interruptible.check()  # between batches
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed since the block was entered."""
        if self.requested:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that are started in the block never see Ctrl-C, from their first moment on.

    A terminal sends it to every process of a program, and one that is still importing its packages answers with a
    traceback. Here it is noted, and acts when the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):  # pragma: no cover  (not on Windows)
        yield
        return
    resource_tracker.ensure_running()  # else it starts with the first process, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """For worker processes: leave Ctrl-C, which the terminal sends to them too, to the main process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
