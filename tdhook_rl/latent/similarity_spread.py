"""How sure a similarity of representations is: what it is without the states of each group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.statistics import Interval, jackknife
from tdhook_rl.statistics.interval import pair_up


def similarity_intervals(
    kernels: Sequence[Tensor], groups: Tensor | None, confidence: float = 0.95
) -> list[list[Interval]]:
    """The debiased similarity of each cloud with each other, with an interval by group.

    Args:
        kernels: K of :meth:`CkaEstimator.kernel_matrix`, debiased, ``(N, N)`` each.
        groups: of the N points; each its own unless given.
        confidence: of the intervals.

    Returns:
        K by K; without an interval where one cannot be had.
    """
    size = len(kernels[0])
    numbers = torch.from_numpy(pair_up(size, groups)).to(kernels[0].device)
    parts = [_of_groups(one, numbers) for one in kernels]
    own = [_without(one, one, part, part, numbers) for one, part in zip(kernels, parts, strict=True)]
    found: dict[tuple[int, int], Interval] = {}
    for first in range(len(kernels)):
        for second in range(first, len(kernels)):
            one, other = kernels[first], kernels[second]
            crossed = own[first]
            if first != second:
                crossed = _without(one, other, parts[first], parts[second], numbers)
            left = (crossed / (own[first] * own[second]).sqrt()).cpu()
            whole = float((one * other).sum())
            told = jackknife(whole, left, rows=size, confidence=confidence, correlation=True)
            found[first, second] = found[second, first] = told
    return [[found[first, second] for second in range(len(kernels))] for first in range(len(kernels))]


def _of_groups(kernel: Tensor, numbers: Tensor) -> Tensor:
    """The sums of the rows over the points of each group, ``(N, groups)``."""
    count = int(numbers.max()) + 1
    return kernel.new_zeros(len(kernel), count).index_add_(1, numbers, kernel)


def _within(of_groups: Tensor, numbers: Tensor) -> Tensor:
    """The sums over both points in each group, ``(groups,)``."""
    own = of_groups[torch.arange(len(numbers)), numbers]
    return own.new_zeros(of_groups.shape[1]).index_add_(0, numbers, own)


def _without(one: Tensor, other: Tensor, one_parts: Tensor, other_parts: Tensor, numbers: Tensor) -> Tensor:
    """The unbiased HSIC of the points that are not in a group, for each, ``(groups,)``; NaN where too few are left.

    Rows of both kernels sum to zero and their diagonals are zero. What centring anew adds to the kernels of the points
    that are left is a function of either point, which the unbiased estimate does not see.
    """
    product = one * other
    of_product = _of_groups(product, numbers)
    total = product.sum() - 2 * of_product.sum(0) + _within(of_product, numbers)
    crossed = one_parts * other_parts
    outside = crossed.sum(0) - _within(crossed, numbers)
    left = (len(numbers) - torch.bincount(numbers, minlength=of_product.shape[1])).to(one.dtype)
    sums = _within(one_parts, numbers) * _within(other_parts, numbers)
    found = total + sums / ((left - 1) * (left - 2)) - 2 * outside / (left - 2)
    return found.masked_fill(left < 4, torch.nan)
