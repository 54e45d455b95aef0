"""How sure the ranks and the norm of the features of a layer are: by the group of each state."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tdhook_rl.metrics.plasticity import Spectrum
from tdhook_rl.statistics import Interval, grouped_mean, jackknife
from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import none, pair_up, t_quantile

#: Into so many parts groups are dealt, each of which is left out once.
PARTS = 20


def rank_intervals(features: Tensor, groups: Tensor | None, delta: float = 0.01) -> dict[str, Interval]:
    """The effective rank, those by entropy and by the largest singular value, and the mean norm, with intervals.

    They are of other states as many as these: a rank grows with them.

    Args:
        features: ``(states, features)``.
        groups: of the states; each its own unless given.
        delta: as of :func:`tdhook_rl.metrics.effective_rank`.
    """
    numbers = torch.from_numpy(pair_up(len(features), groups))
    held = int(numbers.max()) + 1
    # Many groups are dealt into parts at random: one decomposition for each.
    part = (torch.randperm(held, generator=torch.Generator().manual_seed(0)) % PARTS)[numbers].to(features.device)
    whole = Spectrum(features)
    left = [Spectrum(features[part != one]) for one in range(min(held, PARTS))] if held > 1 else [whole]
    found = {
        "entropy_rank": jackknife(whole.entropy_rank(), [one.entropy_rank() for one in left], rows=len(features)),
        "stable_rank": jackknife(whole.stable_rank(), [one.stable_rank() for one in left], rows=len(features)),
    }
    found = {name: replace(one, groups=held, low=max(one.low, 0.0)) for name, one in found.items()}
    found["effective_rank"] = _effective(whole, left, delta, groups=held, rows=len(features))
    return found | {"norm": grouped_mean(features.double().norm(dim=-1), groups)}


def _effective(whole: Spectrum, left: list[Spectrum], delta: float, *, groups: int, rows: int) -> Interval:
    """The numbers of singular values of which it is not told that they leave more than delta, or less.

    A whole number is mostly the same without any of the parts. What is left over without so many values is none: its
    limits, of the root on an arc, say which numbers are too few, and which are enough (Woodruff 1952).
    """
    rank = whole.effective_rank(delta)
    shape = {"confidence": 0.95, "groups": groups, "rows": float(rows)}
    if groups < 2:
        return none(rank, ONE_GROUP, **shape)
    count, parts = len(whole.values), len(left)
    own = whole.left_over(count).sqrt().asin()
    others = torch.stack([one.left_over(count) for one in left]).sqrt().asin()
    spread = ((others - others.mean(0)).square().sum(0) * (parts - 1) / parts).sqrt()
    reach, most = t_quantile(0.95, parts - 1) * spread, math.asin(math.sqrt(delta))
    low, high = (min(int((one > most).sum()) + 1, count) for one in (own - reach, own + reach))
    return Interval(
        estimate=rank, low=min(low, rank), high=max(high, rank), method="inverted jackknife by group",
        words=few_groups(groups, bounded=True), **shape,
    )  # fmt: skip
