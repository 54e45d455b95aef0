"""Ctrl-C at the command line: noted wherever it comes, and the program ends in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

__all__ = ["Stop", "leave"]


class Stop:
    """Notes whether Ctrl-C was pressed, and otherwise leaves it as it is."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        raise KeyboardInterrupt


def leave() -> None:
    """End the program here: what was half imported and half started would complain on the way out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children = sys.modules.get("multiprocessing")
    for child in children.active_children() if children is not None else ():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(130)
