"""Batches from a collector: splits, online probes, results in trainers and logs; workers: live controls, a guard."""

from __future__ import annotations

from typing import Any

from tdhook_rl.rollout.guarded import Guarded
from tdhook_rl.rollout.interrupts import Interruptible, ignore_interrupts
from tdhook_rl.rollout.live_controls import set_controls
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.splits import EPISODE, GroupSplit
from tdhook_rl.rollout.summary import AnnotatedMetrics, summarise

__all__ = [
    "EPISODE",
    "AnnotateHook",
    "AnnotatedMetrics",
    "GroupSplit",
    "Guarded",
    "Interruptible",
    "OnlineProbe",
    "ignore_interrupts",
    "set_controls",
    "summarise",
]


def __getattr__(name: str) -> Any:
    # The trainers of TorchRL are imported with the hook that joins them.
    if name == "AnnotateHook":
        from tdhook_rl.rollout.trainer_hook import AnnotateHook

        return AnnotateHook
    raise AttributeError(f"module 'tdhook_rl.rollout' has no attribute {name!r}")
