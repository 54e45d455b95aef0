"""Offline analysis of replay buffers."""

from tdhook_rl.replay.analysis import analyze
from tdhook_rl.replay.reading import in_order
from tdhook_rl.replay.results import load_results

__all__ = ["analyze", "in_order", "load_results"]
