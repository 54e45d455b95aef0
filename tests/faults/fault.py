"""What a fault is, and how it may end."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

#: The result is what it would have been; or the same call goes on from what is there; or it is said by name, as an
#: error of the library, the caller's own error as it was raised, or a warning, and nothing is damaged.
WHOLE, RESUMABLE, NAMED = "whole", "resumable", "named error"
#: Only of files in formats of others, or lines of text: without checksums, other numbers cannot be told.
AS_IT_IS = "read as it is"
#: How much more time a fault is given that took too long.
BUSY = 4
ENDINGS = (WHOLE, RESUMABLE, NAMED, AS_IT_IS)


class Wrong(AssertionError):
    """A fault that ended in none of these ways."""


class Late(Wrong):
    """A fault that takes too long."""


class Planned(Exception):
    """The error that a callback raises here."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what fails, and where.
        run: brings it about in an empty folder; returns how it ended, or raises :class:`Wrong`.
        seconds: after which it counts as one that hangs; it is tried once more, with more time, where the machine may
            only have been busy.
    """

    name: str
    run: Callable[[Path], str]
    seconds: float = 60.0

    def ending(self, folder: Path) -> str:
        """How it ends; ``"FAULT: ..."`` where in none of the ways that are allowed."""
        try:
            try:
                found = self._found(folder, self.seconds)
            except Late:
                again = folder / "again"
                again.mkdir()
                found = self._found(again, BUSY * self.seconds)
        except Exception as error:
            return f"FAULT: {type(error).__name__}: {error}"
        return found if found in ENDINGS else f"FAULT: {found}"

    def _found(self, folder: Path, seconds: float) -> str:
        # Nothing waits for a real disk here: what was brought to it, and what was not, is for `disk` to say.
        with in_time(seconds), warnings.catch_warnings(), mock.patch.object(os, "fsync", return_value=None):
            warnings.simplefilter("ignore")
            return self.run(folder)


#: Of a kind of fault, a function that makes all of them in a folder for what they share.
Kind = Callable[[Path], Iterator[Fault]]


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """What takes longer raises :class:`Late`."""

    def late(*_: object) -> None:
        raise Late(f"it takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, previous)
