"""Batches from a collector: splits, and probes that are fitted while the agent trains."""

from tdhook_rl.rollout.interrupts import Interruptible, ignore_interrupts
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.splits import EPISODE, GroupSplit

__all__ = ["EPISODE", "GroupSplit", "Interruptible", "OnlineProbe", "ignore_interrupts"]
