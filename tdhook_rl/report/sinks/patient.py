"""A backend that may fail or be slow, without training noticing more than a second of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tdhook_rl.errors import warn

__all__ = ["Patient"]


class Patient:
    """Hands payloads to a sink, in a thread that is waited for, but not for long.

    While the sink answers in time, each call has ended when :meth:`log` returns, so that nothing else writes to the
    sink's logger meanwhile. Where it does not, training goes on and payloads wait in order; where it raises, they are
    kept and tried again with the next. Either is said once, and forgotten as soon as the sink answers again. What finds
    no room, or fails alone among others that do not, is in the local files only.

    Sinks whose ``prompt`` is true only hand over to a process, a thread or a file of their own. They are called as they
    are, which costs half, until the first call that fails or takes too long; one that never returns is waited for.

    Args:
        sink: with ``log(metrics, step)`` and ``close()``.
        patience: seconds that a call is waited for.
        room: how many payloads may wait.

    Attributes:
        left_out: how many payloads the sink has not taken, and is not given any more.
    """

    def __init__(self, sink: Any, *, patience: float = 1.0, room: int = 1000) -> None:
        self.sink = sink
        self._prompt = bool(getattr(sink, "prompt", False))
        self._patience, self._room = patience, room
        self._name = getattr(sink, "name", type(sink).__name__)
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._suspects = 0  # of those that wait, how many failed or stood behind one that did
        self._down = self._late = self._ending = False
        self._fresh = False  # something has come since the sink failed
        self.left_out = 0
        self._error: Exception | None = None
        self._closing_error: Exception | None = None
        self._told: set[str] = set()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Hand values on."""
        self.call(lambda: self.sink.log(metrics, step))

    def call(self, job: Callable[[], None]) -> None:
        """Hand on anything that is to be done with the sink, in order."""
        if self._prompt and self._was_prompt(job):
            return
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"log to {self._name}", daemon=True)
                self._thread.start()
            if len(self._waiting) >= self._room:
                self._waiting.popleft()
                self._suspects = max(0, self._suspects - 1)
                self.left_out += 1
            self._waiting.append(job)
            self._fresh = True
            self._changed.notify_all()
            if not (self._late or self._down) and not self._changed.wait_for(self._settled, self._patience):
                self._late = True
        self._say()

    def _was_prompt(self, job: Callable[[], None]) -> bool:
        """Do it here; whether it is done. What fails is left to the thread, and so is whatever follows."""
        start = time.monotonic()
        try:
            job()
        except Exception:
            self._prompt = False
            return False
        if time.monotonic() - start > self._patience:
            self._prompt = False
            self._tell_late()
        return True

    def close(self, timeout: float = 30.0) -> None:
        """Wait until all is handed on, and close the sink.

        Args:
            timeout: seconds, after which it is left as it is.
        """
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"close {self._name}", daemon=True)
                self._thread.start()
            self._fresh = True
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout)
        self._say()
        with self._changed:
            self.left_out += len(self._waiting)
            self._waiting.clear()
        if self._thread.is_alive():
            self._tell("end", f"{self._name} did not end within {timeout:g} s, and is left; local files are complete")
        elif self._closing_error is not None:
            error = self._closing_error
            self._tell("end", f"{self._name} did not close cleanly ({type(error).__name__}: {error})")
        elif self.left_out and not self._told:
            self._tell("end", f"{self._name} refused {self.left_out} calls to log ({self._words()}): see local files")

    def _settled(self) -> bool:
        return not self._waiting or self._down

    def _say(self) -> None:
        """In the caller's thread, so that a warning is about the caller's line."""
        with self._changed:
            error, late = self._error if self._down else None, self._late and not self._down
            words = getattr(self.sink, "words", [])
            said, words[:] = list(words), []
        for one in said:
            warn(one)
        if error is not None:
            self._tell("error", f"{self._name} failed ({self._words()}): local files go on, and it is tried again")
        if late:
            self._tell_late()

    def _tell_late(self) -> None:
        words = f"{self._name} takes longer than {self._patience:g} s: training and local files go on"
        self._tell("late", f"{words}; what it is given waits")

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn(message)

    def _words(self) -> str:
        error = self._error
        return "no room" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ending or (bool(self._waiting) and (self._fresh or not self._down))
                )
                if not self._waiting or (self._ending and self._down and not self._fresh):
                    break
                # Where the sink was down, the newest shows whether it is: what it fails with may be the oldest's fault.
                place = -1 if self._down else 0
                job, self._fresh = self._waiting[place], False
            try:
                job()
                error = None
            except Exception as raised:
                error = raised
            with self._changed:
                self._after(job, error)
                self._changed.notify_all()
        try:
            self.sink.close()
        except Exception as error:
            self._closing_error = error

    def _after(self, job: Callable[[], None], error: Exception | None) -> None:
        if error is None:
            if self._down:
                self._down, self._suspects = False, len(self._waiting) - 1
            else:
                self._suspects = max(0, self._suspects - 1)
        else:
            self._error = error
        if error is None or self._suspects > 0:
            if error is not None:  # others were taken since it failed: it is this one
                self._suspects -= 1
                self.left_out += 1
            if job in self._waiting:
                self._waiting.remove(job)
            self._late = self._late and bool(self._waiting)
        else:
            self._down = True
