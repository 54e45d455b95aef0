"""Offline analysis of replay buffers."""

from tdhook_rl.replay.analysis import analyze, in_order

__all__ = ["analyze", "in_order"]
