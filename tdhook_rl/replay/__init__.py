"""Offline analysis of replay buffers.

Knows buffers and hooked policies, and the files that results are kept in; no method by name.
"""

from tdhook_rl.reading.reader import in_order
from tdhook_rl.replay.analysis import analyze
from tdhook_rl.replay.columns import frame
from tdhook_rl.replay.feature_means import by_feature
from tdhook_rl.replay.minari_export import to_minari
from tdhook_rl.replay.parquet import load_parquet, to_parquet
from tdhook_rl.replay.probe_grid import probe_grid
from tdhook_rl.replay.queries import Returns, episodes, returns, rows_where, smallest_margins
from tdhook_rl.replay.results import load_results

__all__ = [
    "Returns",
    "analyze",
    "by_feature",
    "episodes",
    "frame",
    "in_order",
    "load_parquet",
    "load_results",
    "probe_grid",
    "returns",
    "rows_where",
    "smallest_margins",
    "to_minari",
    "to_parquet",
]
