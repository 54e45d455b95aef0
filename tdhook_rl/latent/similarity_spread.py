"""The similarity of representations from pairs of points of different groups, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.statistics import Interval, jackknife
from tdhook_rl.statistics.interval import none, pair_up

#: Below so many groups there are no four points of different groups: pairs within a group stay in.
LEAST_GROUPS = 4
#: An HSIC(K, K) up to this share of the largest of its terms is zero but for rounding.
_ROUNDING = 1e-6


class ByGroup:
    """What a representation has between points of different groups.

    Args:
        numbers: of the groups of the N points, from 0.
        kernel: ``(N, N)``, centred or not: what depends on one of two points alone cancels.
        features: ``(N, D)``, instead: of their linear kernel, which is not made.
    """

    def __init__(self, numbers: Tensor, *, kernel: Tensor | None = None, features: Tensor | None = None) -> None:
        self.numbers, self.kernel, self.features = numbers, kernel, features
        self.count = int(numbers.max()) + 1
        # A last group without points: leaving it out leaves all in.
        self.own = torch.nn.functional.one_hot(numbers, self.count + 1).bool()
        if features is not None:
            to_groups = features @ _over_groups(features, numbers, self.count + 1).mT
        else:
            assert kernel is not None
            to_groups = _over_groups(kernel, numbers, self.count + 1).mT
        self.to_groups = to_groups.masked_fill_(self.own, 0)
        self.between = _over_groups(self.to_groups, numbers, self.count + 1)
        self.size = torch.bincount(numbers, minlength=self.count + 1).to(to_groups) / len(numbers)
        self.to_others, self.to_weighted = _others(self.to_groups), _others(self.to_groups * self.size)

    def products(self, other: ByGroup) -> Tensor:
        """The sums of the products of both kernels over the points of each two groups, ``(groups + 1, groups + 1)``."""
        if self.features is not None and other.features is not None:
            order = self.numbers.argsort()
            sizes = [*torch.bincount(self.numbers).tolist(), 0]
            sides = (one[order].split(sizes) for one in (self.features, other.features))
            crossed = torch.stack([(one.mT @ two).flatten() for one, two in zip(*sides, strict=True)])
            return (crossed @ crossed.mT).fill_diagonal_(0)
        assert self.kernel is not None
        assert other.kernel is not None
        rows = _over_groups(self.kernel * other.kernel, self.numbers, self.count + 1)
        return _over_groups(rows.mT, self.numbers, self.count + 1).fill_diagonal_(0)


def _over_groups(table: Tensor, numbers: Tensor, count: int) -> Tensor:
    """The sums of rows over the points of each group, ``(groups, ...)``."""
    return table.new_zeros(count, table.shape[1]).index_add_(0, numbers, table)


def crossed_hsic(one: ByGroup, other: ByGroup) -> tuple[Tensor, Tensor]:
    """The unbiased HSIC of points of four different groups, up to one factor: without each group and, last, of all.

    It is the sum of K_ij (L_ij - 2 L_ik + L_kl) over all i, j, k, l of different groups, over N^2: where each point is
    its own group, the usual estimate (Song et al. 2012). Each term counts as often as points are left for the others:
    so what depends on one point alone cancels, such as an offset of the features, for groups of unequal sizes too.

    Returns:
        ``(groups + 1,)`` each: the sums, and the first of their three terms.
    """
    rows, size = len(one.numbers), one.size
    left, squares = size.sum() - size, size.square().sum() - size.square()
    products = one.products(other)
    sums, along = products.sum(0), products @ size
    # As often as there are two points in two of the groups that are left: their number squared, without the same twice.
    by_one = size @ sums - size * sums - along
    by_square = size.square() @ sums - size.square() * sums - products @ size.square()
    by_both = size @ along - 2 * size * along
    first = (left.square() - squares) * (sums.sum() - 2 * sums) - 4 * left * by_one + 4 * by_square + 2 * by_both
    both_to = one.to_groups * other.to_groups
    terms = one.to_others.mul(other.to_others).sub_(_others(both_to)).mul_(left - size[one.numbers, None])
    terms.addcmul_(one.to_weighted, other.to_others, value=-1).addcmul_(one.to_others, other.to_weighted, value=-1)
    terms.add_(_others(both_to.mul_(size)), alpha=2)
    second = terms.masked_fill_(one.own, 0).sum(0)
    apart = (_others(one.between) * _others(other.between)).fill_diagonal_(0)
    third = _all_of(one.between) * _all_of(other.between) - 4 * apart.sum(0) + 2 * _all_of(one.between * other.between)
    return first - 2 * second / rows + third / rows**2, first


def _others(table: Tensor) -> Tensor:
    """The sum of each row without each of its columns."""
    return table.sum(-1, keepdim=True) - table


def _all_of(table: Tensor) -> Tensor:
    """The sum of a symmetric table without each row and its column; its diagonal is 0."""
    return table.sum() - 2 * table.sum(0)


def crossed_similarity(crossed: Tensor, own: Sequence[Tensor]) -> Tensor:
    """CKA from three HSICs; NaN where a representation is the same in all points, or but for those of one group."""
    return crossed / (own[0] * own[1]).sqrt()


def own_hsic(one: ByGroup) -> Tensor:
    """HSIC(K, K) as of :func:`crossed_hsic`; NaN where it is zero but for rounding, or below by chance."""
    found, size = crossed_hsic(one, one)
    return found.masked_fill(found <= _ROUNDING * size, math.nan)


def similarity_intervals(
    kernels: Sequence[Tensor], groups: Tensor | None, confidence: float = 0.95
) -> list[list[Interval]]:
    """The debiased similarity of each cloud with each other, with an interval by group.

    Below four groups pairs within a group stay in, and there is no interval.

    Args:
        kernels: K of :meth:`CkaEstimator.kernel_matrix`, debiased, ``(N, N)`` each.
        groups: of the N points; each its own unless given.
        confidence: of the intervals.

    Returns:
        K by K; without an interval where one cannot be had.
    """
    size = len(kernels[0])
    numbers = torch.from_numpy(pair_up(size, groups)).to(kernels[0].device)
    held = int(numbers.max()) + 1
    clouds = [ByGroup(numbers, kernel=one) for one in kernels] if held >= LEAST_GROUPS else []
    own = [own_hsic(one) for one in clouds]
    found: dict[tuple[int, int], Interval] = {}
    for first in range(len(kernels)):
        for second in range(first, len(kernels)):
            if clouds:
                crossed = own[first] if first == second else crossed_hsic(clouds[first], clouds[second])[0]
                *left, whole = crossed_similarity(crossed, (own[first], own[second])).tolist()
                told = jackknife(whole, left, rows=size, confidence=confidence, correlation=True)
            else:
                words = "one group only" if held == 1 else f"only {held} groups"
                words += f": below {LEAST_GROUPS}, pairs of points within a group stay in, and make the figure too high"
                whole = float((kernels[first] * kernels[second]).sum())
                told = none(whole, words, confidence=confidence, groups=held, rows=size)
            found[first, second] = found[second, first] = told
    return [[found[first, second] for second in range(len(kernels))] for first in range(len(kernels))]
