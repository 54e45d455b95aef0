"""What there is to be brought over between two runs, and shares of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import limits, none, pair_up

#: Below so many units of rounding of the larger metric there is no difference of two runs to be brought over.
ROUNDING = 64


@dataclass(frozen=True)
class Gap:
    """What there is to be brought over.

    Args:
        base: ``(states,)``, the metric of the run that is patched.
        source: of the run that the activations are from.
        dtype: what the policy computes in, whose rounding is no difference.
    """

    base: Tensor
    source: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def known(self) -> Tensor:
        """Where there is a difference that is no rounding, and a number."""
        size = torch.maximum(self.base.abs(), self.source.abs())
        gap = self.source - self.base
        return torch.isfinite(gap) & (gap.abs() > ROUNDING * torch.finfo(self.dtype).eps * size)

    def shares(self, reached: Tensor) -> Tensor:
        """``(..., states)``: of the metric that patched runs reach; NaN where there is nothing to share."""
        share = (reached - self.base) / (self.source - self.base)
        return torch.where(self.known & torch.isfinite(share), share, torch.nan)

    def pooled(self, reached: Tensor) -> Tensor:
        """``(...)``: all of the change, towards the source, over all of the difference."""
        gap = self.source - self.base
        share = self.shares(reached)
        usable = torch.isfinite(share)
        weight = torch.where(usable, gap.abs(), 0.0)
        return (torch.where(usable, share, 0.0) * weight).sum(-1) / weight.sum(-1)

    def left_out(self, reached: Tensor) -> str:
        """How many states are left out and why, in words."""
        gap = self.source - self.base
        odd = ~torch.isfinite(gap) | (self.known & ~torch.isfinite(reached))
        same = ~self.known & ~odd
        parts = [f"{int(same.sum())} with no difference between the two runs"] if bool(same.any()) else []
        parts += [f"{int(odd.sum())} with a metric that is not finite"] if bool(odd.any()) else []
        return f"left out of {len(gap)} states: {', '.join(parts)}" if parts else ""


def pooled_shares(changes: Tensor, gap: Gap, groups: Tensor | None) -> list[Interval | None]:
    """For each row of changes its share of the difference, pooled over states, with an interval by group.

    Args:
        changes: ``(rows, states)``, of the metric; a row of NaN has no share.
        gap: what there is to be brought over.
        groups: of the states.
    """
    known = gap.known
    count = int(known.sum())
    shape = {"confidence": 0.95, "rows": count}
    if not count:
        return [none(math.nan, "no state is left", groups=0, **shape)] * len(changes)
    gaps = gap.source - gap.base
    if count < len(known):
        changes, gaps, groups = changes[:, known], gaps[known], None if groups is None else groups[known]
    size = gaps.abs()
    total = size.sum()
    along = changes.double() * (torch.sign(gaps) / total)
    shares = along.sum(-1)
    numbers = torch.from_numpy(pair_up(count, groups))
    held = int(numbers.max()) + 1
    residuals = torch.addr(along, shares, size / total, alpha=-1)
    if held < count:
        residuals = torch.zeros(len(changes), held, dtype=torch.float64).index_add_(1, numbers, residuals)
    weights = torch.zeros(held, dtype=torch.float64).index_add_(0, numbers, size)
    # What the shares are without each group, whose difference may be most of it all; see variance_by_group.
    moves = residuals / (1 - weights / total)
    variances = torch.linalg.vecdot(moves, moves) * ((held - 1) / held)
    freedom = max(min(float(weights.sum() ** 2 / weights.square().sum()), held) - 1, 1.0)
    words = few_groups(held)
    found: list[Interval | None] = []
    for share, variance in zip(shares.tolist(), variances.tolist(), strict=True):
        if math.isnan(share):
            found.append(None)
        elif held < 2:
            found.append(none(share, ONE_GROUP, groups=held, **shape))
        else:
            found.append(limits(share, variance, freedom=freedom, groups=held, words=words, **shape))
    return found
