"""How sure a figure is: intervals by group, robust means, corrections for many claims, what could be detected at all.

Rows of one episode resemble each other, and so do episodes of one seed: the unit that is drawn anew is the *group*, and
an interval that takes rows for independent is too narrow. Every function here works by group and returns an
:class:`Interval`, which says how it was made, from how many groups and rows, or in words why there is none. Percentile
bootstraps are not used: at a nominal .95 they cover .51 of the time with 2 groups, .85 with 5 and .92 with 20.
"""

from tdhook_rl.statistics.cautions import FEW_GROUPS
from tdhook_rl.statistics.claims import benjamini_hochberg, holm, minimum_detectable_effect, probability_of_improvement
from tdhook_rl.statistics.differences import accuracy_difference, r_squared_difference
from tdhook_rl.statistics.interval import Interval
from tdhook_rl.statistics.left_out import jackknife
from tdhook_rl.statistics.means import (
    grouped_mean,
    p_value,
    paired_difference,
    ratio_of_means,
    unpaired_difference,
)
from tdhook_rl.statistics.robust import bootstrap, iqm
from tdhook_rl.statistics.scores import area_under_curve, balanced_accuracy, r_squared

__all__ = [
    "FEW_GROUPS",
    "Interval",
    "accuracy_difference",
    "area_under_curve",
    "balanced_accuracy",
    "benjamini_hochberg",
    "bootstrap",
    "grouped_mean",
    "holm",
    "iqm",
    "jackknife",
    "minimum_detectable_effect",
    "p_value",
    "paired_difference",
    "probability_of_improvement",
    "r_squared",
    "r_squared_difference",
    "ratio_of_means",
    "unpaired_difference",
]
