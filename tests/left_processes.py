"""Processes that a test has left behind."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Collection
from multiprocessing.process import BaseProcess

#: Seconds in which a worker that was told to end has ended, on a busy machine too: TorchRL does not wait for all.
PATIENCE = 10.0


def left_behind(known: Collection[BaseProcess] = ()) -> list[BaseProcess]:
    """The children of this process, beside those ``known`` before, that do not end by themselves."""
    limit = time.monotonic() + PATIENCE
    for child in multiprocessing.active_children():
        if child not in known:
            child.join(max(0.0, limit - time.monotonic()))
    return [child for child in multiprocessing.active_children() if child not in known]
