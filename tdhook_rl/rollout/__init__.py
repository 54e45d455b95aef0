"""Batches from a collector: splits, online probes, and results in trainers, evaluators and logs."""

from __future__ import annotations

from typing import Any

from tdhook_rl.rollout.interrupts import Interruptible, ignore_interrupts
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.splits import EPISODE, GroupSplit
from tdhook_rl.rollout.summary import AnnotatedMetrics, summarise

__all__ = [
    "EPISODE",
    "AnnotateHook",
    "AnnotatedMetrics",
    "GroupSplit",
    "Interruptible",
    "OnlineProbe",
    "ignore_interrupts",
    "summarise",
]


def __getattr__(name: str) -> Any:
    # The trainers of TorchRL are imported with the hook that joins them.
    if name == "AnnotateHook":
        from tdhook_rl.rollout.trainer_hook import AnnotateHook

        return AnnotateHook
    raise AttributeError(f"module 'tdhook_rl.rollout' has no attribute {name!r}")
