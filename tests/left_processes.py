"""Processes that a test has left behind."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.process import BaseProcess

#: Seconds in which a worker that was told to end has ended, on a busy machine too: TorchRL does not wait for all.
PATIENCE = 10.0


def left_behind() -> list[BaseProcess]:
    """The children of this process that do not end by themselves."""
    limit = time.monotonic() + PATIENCE
    for child in multiprocessing.active_children():
        child.join(max(0.0, limit - time.monotonic()))
    return multiprocessing.active_children()
