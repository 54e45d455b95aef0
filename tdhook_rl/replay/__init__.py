"""Offline analysis of replay buffers.

Knows buffers and hooked policies, and the files that results are kept in; no method by name.
"""

from tdhook_rl.replay.analysis import analyze
from tdhook_rl.replay.probe_grid import probe_grid
from tdhook_rl.replay.queries import Returns, by_feature, episodes, returns, rows_where, smallest_margins
from tdhook_rl.replay.reading import in_order
from tdhook_rl.replay.results import load_results

__all__ = [
    "Returns",
    "analyze",
    "by_feature",
    "episodes",
    "in_order",
    "load_results",
    "probe_grid",
    "returns",
    "rows_where",
    "smallest_margins",
]
