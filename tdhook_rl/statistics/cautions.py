"""What has to be known of an interval, in words: where groups are few, alike or skewed it holds less than it says."""

from __future__ import annotations

import numpy as np

#: Below so many groups nothing is resampled: a t interval by group, or none.
FEW_GROUPS = 10
#: Why an estimate has no limits, where all of it is of one group.
ONE_GROUP = "one group only: nothing says how much groups differ"
#: Where resamples do not tell how far they are off.
ALIKE_RESAMPLES = "resamples hold groups that are all alike too often to tell the limits"
#: From this skewness of groups on an interval of their mean says that it may be too narrow.
_SKEWED = 2.0


def few_groups(count: int, where: str = "", *, bounded: bool = False) -> str:
    """What has to be known of an interval of so few groups; nothing from :data:`FEW_GROUPS` on.

    Args:
        count: how many there are.
        where: of what, such as ``" on a side"``.
        bounded: the interval is one within bounds, which few groups make too wide rather than too narrow.
    """
    if count >= FEW_GROUPS:
        return ""
    return f"only {count} groups{where}: a t interval by group" + ("" if bounded else ", too narrow if they are skewed")


def skewed_groups(residuals: np.ndarray) -> str:
    """What has to be known where a few groups differ far more than the others; nothing where none do.

    Args:
        residuals: ``(groups,)``, what each group adds to an estimate about its mean.
    """
    if not residuals.any():
        return ""
    scaled = residuals / np.abs(residuals).max()
    skewness = (scaled**3).mean() / np.square(scaled).mean() ** 1.5
    return "a few groups differ far more than the others: it may be too narrow" if abs(skewness) > _SKEWED else ""


def all_alike(groups: int, confidence: float) -> str:
    """What groups that are all alike say of others, whose interval has no width (Clopper & Pearson 1934)."""
    others = 1 - (1 - confidence) ** (1 / groups)
    return f"all {groups} groups are alike, though up to {others:.0%} of others may not be"
