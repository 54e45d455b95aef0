"""Batches from a collector: splits, probes that are fitted while the agent trains, and a check before it does."""

from typing import TYPE_CHECKING, Any

from tdhook_rl.rollout.interrupts import Interruptible, ignore_interrupts
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.splits import EPISODE, GroupSplit

if TYPE_CHECKING:
    from tdhook_rl.rollout.doctor import check
    from tdhook_rl.rollout.findings import Finding, Report

_HOME = {
    "Finding": "tdhook_rl.rollout.findings",
    "Report": "tdhook_rl.rollout.findings",
    "check": "tdhook_rl.rollout.doctor",
}

__all__ = [
    "EPISODE",
    "Finding",
    "GroupSplit",
    "Interruptible",
    "OnlineProbe",
    "Report",
    "check",
    "ignore_interrupts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tdhook_rl.rollout' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
