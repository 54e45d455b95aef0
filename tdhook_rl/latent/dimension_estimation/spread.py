"""How sure a figure of near points is: by group, and by the neighbours that points share."""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import read_points
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cautions import ONE_GROUP, few_groups
from tdhook_rl.statistics.interval import check_confidence, limits, none, pair_up


def read_cloud(points: Tensor, *, rows: int) -> Tensor:
    """One cloud of finite points, ``(N, D)``, in double precision on the processor.

    Raises:
        InputError: for another shape or dtype, too few points, NaN or infinite entries.
    """
    cloud = read_points(TensorDict({"points": points}), "points", rows=rows)
    if cloud.ndim != 2:
        raise InputError(f"an interval is of one cloud, points (N, D), got {tuple(cloud.shape)}: one call for each")
    return cloud.detach().double().cpu()


def places(neighbours: Tensor) -> Tensor:
    """Whether a point is among the neighbours ``(N, k)`` of another, ``(N, N)``."""
    count = len(neighbours)
    return torch.zeros(count, count, dtype=torch.bool).scatter_(1, neighbours, torch.ones_like(neighbours).bool())


def spread_interval(
    estimate: float, influences: Tensor, near: Tensor, groups: Tensor | None, confidence: float
) -> Interval:
    """A t interval of an estimate that is not negative, from what each point adds to it.

    The variance is the sum of the products of influences over pairs of points of one group, and of points of which one
    is the neighbour of the other: these are estimated from the same distances. Where neighbours make up for each other,
    as the distances of the k nearest do on a line, that sum is less than over groups alone, and at random far less: the
    larger of the two is taken.

    Points are left out one by one with the neighbours of the others as they were, and none is drawn twice: a copy would
    be the nearest neighbour of itself. Searching neighbours anew without each part of the points gives intervals that
    are twice as wide as these figures scatter.

    Args:
        estimate: of the cloud.
        influences: ``(N,)``: what a point moves the estimate by, times N.
        near: ``(N, N)``: whether a point's figure was read off the distance to another.
        groups: of the points; each its own unless given.
        confidence: of the interval.
    """
    check_confidence(confidence)
    count = len(influences)
    numbers = torch.from_numpy(pair_up(count, groups))
    held = int(numbers.max()) + 1
    shape = {"confidence": confidence, "groups": held, "rows": count}
    if held < 2:
        return none(estimate, ONE_GROUP, **shape)
    words = few_groups(held)
    along = influences - influences.mean()
    if not bool(along.any()):
        return limits(estimate, 0.0, freedom=held - 1, words=f"all {count} points say the same", **shape)
    together = numbers[:, None] == numbers
    variance = max(_variance(along, together), _variance(along, together | near | near.mT))
    found = limits(estimate, variance, freedom=held - 1, words=words, **shape)
    return replace(found, low=max(found.low, 0.0), method="t by group and neighbours")


def _variance(along: Tensor, pairs: Tensor) -> float:
    """Of the mean: the sum of the products over the pairs; 0 where all points are pairs of each other."""
    # Values about their own mean sum to zero over all pairs: what that takes away is given back.
    linked = pairs.double()
    apart = 1 - float(linked.mean())
    return float(along @ (linked @ along)) / len(along) ** 2 / apart if apart > 0 else 0.0
