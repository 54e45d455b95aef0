"""Figures: each is one function from plain data (arrays, intervals, mappings) to a ``Drawing``.

Knows numbers and frames; no policy, no log and no file. A family of figures is one module, and what it is drawn with is
in ``style``: five colours that colour-blind readers tell apart, in the light and in the dark, each with a line and a
marker of its own.
"""

from tdhook_rl.report.figures.bars import grouped_bars
from tdhook_rl.report.figures.episode import attribution_through_episode
from tdhook_rl.report.figures.grids import value_grid
from tdhook_rl.report.figures.health import network_health
from tdhook_rl.report.figures.histograms import histograms_over_time
from tdhook_rl.report.figures.lines import lines
from tdhook_rl.report.figures.maps import attribution_maps, overlays
from tdhook_rl.report.figures.overview import overview
from tdhook_rl.report.figures.probes import probe_curves
from tdhook_rl.report.figures.response import dose_curve
from tdhook_rl.report.figures.seeds import seed_curves

__all__ = [
    "attribution_maps",
    "attribution_through_episode",
    "dose_curve",
    "grouped_bars",
    "histograms_over_time",
    "lines",
    "network_health",
    "overlays",
    "overview",
    "probe_curves",
    "seed_curves",
    "value_grid",
]
