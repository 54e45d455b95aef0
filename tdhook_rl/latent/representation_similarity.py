"""How alike two representations of the same inputs are: kernel alignment, and which one predicts the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import check_keys, distances, read_points, write_results
from tdhook_rl.latent.dimension_estimation.spread import spread_interval
from tdhook_rl.latent.similarity_spread import similarity_intervals
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import pair_up


class CkaEstimator(TensorDictModuleBase):
    """Centred kernel alignment: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), of two kernels on the same N points.

    1 for representations equal up to rotation, isotropic scale and offset (Kornblith, Norouzi, Lee & Hinton 2019,
    ICML; linear and RBF kernels). The plain estimate grows with the features at fixed N: with fewer points than
    features even independent data score high. ``debiased`` uses the unbiased HSIC of Song, Smola, Gretton, Bedo &
    Borgwardt 2012 (JMLR 13), as Nguyen, Raghu & Kornblith 2020 (arXiv:2010.15327) do: about 0 for independent
    data, and possibly below 0.

    Reads ``in_key_a``: ``(..., N, D_a)`` and ``in_key_b``: ``(..., N, D_b)``, with the same leading dimensions and
    N, row i of both from one input. Writes ``out_key``: ``(...)``. The linear kernel takes N D^2 time when there
    are more points than features; otherwise, and for RBF, time and memory grow with N^2. A representation that is
    constant over its points has no similarity, and with ``debiased`` one that is constant but for a single point:
    the result of that cloud is NaN, others are unaffected. A locked TensorDict is not changed: the result is in
    the returned shallow copy.

    Args:
        in_key_a: where the first representation is.
        in_key_b: where the second one is.
        out_key: where the similarity goes.
        kernel: ``"linear"`` or ``"rbf"``, exp(-distance^2 / (2 sigma^2)).
        debiased: whether to use the unbiased HSIC, which needs 4 points (the plain one: 2).
        eps: a representation whose root mean square distance to its centre is at most ``eps`` times its root mean
            square counts as constant (rounding makes constant float32 data scatter by about 1e-7); likewise an
            unbiased HSIC(K, K) against the terms that it is the difference of.
        bandwidth: sigma of the RBF kernel, as a share of the median distance between two points of the cloud.

    Raises:
        MissingKeyError: if the TensorDict lacks a key.
        KeyCollisionError: if the result would replace a representation.
        InputError: for another shape or dtype, too few points, NaN, a and b that do not pair up, an unknown
            kernel, or an RBF bandwidth of zero because half the pairs of points coincide.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> a = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDict({"data_a": a, "data_b": 3 * a.flip(-1) + 1})
        >>> round(CkaEstimator()(data)["cka"].item(), 4)
        1.0
    """

    @checked
    def __init__(
        self,
        *,
        in_key_a: NestedKey = "data_a",
        in_key_b: NestedKey = "data_b",
        out_key: NestedKey = "cka",
        kernel: Literal["linear", "rbf"] = "linear",
        debiased: bool = False,
        eps: float = 1e-6,
        bandwidth: float = 1.0,
    ) -> None:
        super().__init__()
        if kernel not in ("linear", "rbf"):
            raise InputError(f"a kernel is 'linear' or 'rbf', got {kernel!r}")
        if not (eps >= 0 and bandwidth > 0 and math.isfinite(bandwidth)):
            raise InputError(f"eps is at least 0 and bandwidth positive, got {eps} and {bandwidth}")
        self.in_key_a, self.in_key_b, self.out_key = in_key_a, in_key_b, out_key
        self.kernel, self.debiased, self.eps, self.bandwidth = kernel, debiased, eps, bandwidth
        self.in_keys, self.out_keys = [in_key_a, in_key_b], [out_key]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the similarity of each pair of clouds."""
        a, b = read_pair(tensordict, self.in_key_a, self.in_key_b, rows=4 if self.debiased else 2)
        a, constant_a = self._centred(a)
        b, constant_b = self._centred(b)
        if self.kernel == "linear" and max(a.shape[-1], b.shape[-1]) <= a.shape[-2]:
            cross, _ = self._by_features(a, b)
            (own_a, size_a), (own_b, size_b) = self._by_features(a, a), self._by_features(b, b)
        else:
            gram_a, size_a = self._gram(a, constant_a, self.in_key_a)
            gram_b, size_b = self._gram(b, constant_b, self.in_key_b)
            cross, own_a, own_b = ((x * y).sum((-2, -1)) for x, y in ((gram_a, gram_b), (gram_a,) * 2, (gram_b,) * 2))
        # An unbiased HSIC(K, K) that is zero up to rounding would make the ratio an arbitrary number.
        undefined = constant_a | constant_b | (own_a <= self.eps * size_a) | (own_b <= self.eps * size_b)
        return write_results(
            tensordict, {self.out_key: (cross / (own_a.sqrt() * own_b.sqrt())).masked_fill(undefined, math.nan)}
        )

    @checked
    def matrix(self, clouds: Sequence[Tensor]) -> Tensor:
        """The similarity of each cloud with each other, from one kernel matrix for each.

        Args:
            clouds: K representations of the same inputs, each ``(N, D)``.

        Returns:
            ``(K, K)``; NaN where a cloud is constant.

        Raises:
            InputError: as of a call, or if there is no cloud.

        Example:
            >>> a = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
            >>> [[round(x, 3) for x in row] for row in CkaEstimator().matrix([a, 2 * a]).tolist()]
            [[1.0, 1.0], [1.0, 1.0]]
        """
        if not clouds:
            raise InputError("there is no representation to compare")
        kernels = [self.kernel_matrix(cloud).flatten() for cloud in clouds]
        if len({len(one) for one in kernels}) > 1:
            shapes = [tuple(cloud.shape) for cloud in clouds]
            raise InputError(f"the clouds have a row for each of the same inputs, got {shapes}")
        stacked = torch.stack(kernels)
        return stacked @ stacked.mT

    @checked
    def interval(self, a: Tensor, b: Tensor, groups: Tensor | None = None, *, confidence: float = 0.95) -> Interval:
        """The similarity of two clouds, with an interval: from what it is without the points of each group.

        Points of a group, such as the steps of an episode, are alike in both clouds for no reason of the layers. With
        groups, only points of different ones are compared: the unbiased HSIC of four points of four groups. Of 5 to 10
        unrelated slow episodes a call gives .19 to .24 on average, and this 0 within .014, with intervals that hold 0
        each time (``test_similarity_intervals``). Of four groups there is no interval; of fewer, the estimate is
        that of a call, too.

        Args:
            a, b: two representations of the same inputs, ``(N, D_a)`` and ``(N, D_b)``.
            groups: the group of each point, such as its episode; each its own unless given.
            confidence: of the interval.

        Raises:
            InputError: as of a call; or of an estimator that is not debiased, whose value for independent clouds
                depends on how many points and features there are.

        Example:
            >>> a = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
            >>> b = a + torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
            >>> found = CkaEstimator(debiased=True).interval(a, b)
            >>> 0 < found.low < found.estimate < found.high < 1
            True
        """
        if not self.debiased:
            raise InputError(
                "an interval is about a similarity that is 0 of independent data: CkaEstimator(debiased=True)"
            )
        a, b = read_pair(TensorDict({"a": a, "b": b}), "a", "b", rows=4)
        kernels = [self.kernel_matrix(one) for one in (a, b)]
        return similarity_intervals(kernels, groups, confidence)[0][1]

    @checked
    def kernel_matrix(self, cloud: Tensor) -> Tensor:
        """What the similarity of a cloud with others is read from: the sum of the products of two of these is theirs.

        Args:
            cloud: ``(N, D)``.

        Returns:
            ``(N, N)``, float64: the centred kernel matrix over its norm; NaN where the cloud is constant.

        Raises:
            InputError: as of a call.
        """
        points = read_points(TensorDict({"cloud": cloud}), "cloud", rows=4 if self.debiased else 2)
        if points.ndim != 2:
            raise InputError(f"a cloud is (N, D), got {tuple(points.shape)}")
        points, constant = self._centred(points.double())
        gram, size = self._gram(points, constant, "cloud")
        own = gram.square().sum()
        return (gram / own.sqrt()).masked_fill(constant | (own <= self.eps * size), math.nan)

    def _centred(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points about their mean and of mean square 1, and whether the cloud is constant."""
        centred = points - points.mean(-2, keepdim=True)
        spread = centred.square().mean((-2, -1), keepdim=True).sqrt()
        size = points.square().mean((-2, -1), keepdim=True).sqrt()
        constant = spread <= self.eps * size
        # Fourth powers follow: without the division they leave the range of float32 for features of size 1e10.
        return centred / spread.masked_fill(constant, 1), constant[..., 0, 0]

    def _by_features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """HSIC of linear kernels up to a factor of N, without an N x N table, and the size of its largest term."""
        inner = (x.mT @ y).square().sum((-2, -1))
        if not self.debiased:
            return inner, inner
        rows = x.shape[-2]
        # The diagonals leave both kernels. As the points are centred, what is left of row i sums to -|x_i|^2.
        norm_x, norm_y = x.square().sum(-1), y.square().sum(-1)
        both = (norm_x * norm_y).sum(-1)
        total = norm_x.sum(-1) * norm_y.sum(-1)
        return inner - both + total / ((rows - 1) * (rows - 2)) - 2 * both / (rows - 2), inner

    def _gram(self, points: Tensor, constant: Tensor, key: NestedKey) -> tuple[Tensor, Tensor]:
        """The centred kernel matrix (zero diagonal and row sums for the unbiased HSIC), and its size before that."""
        rows = points.shape[-2]
        if self.kernel == "linear":
            gram = points @ points.mT
        else:
            apart = distances(points)
            pairs = torch.triu_indices(rows, rows, 1, device=points.device)
            middle = apart[..., pairs[0], pairs[1]].median(-1).values
            if bool(((middle == 0) & ~constant).any()):
                raise InputError(
                    f"half of the pairs of points of {key!r} coincide, so the median distance, which sets the RBF "
                    "bandwidth, is 0; drop duplicates or use kernel='linear'"
                )
            sigma = self.bandwidth * middle.masked_fill(constant, 1)[..., None, None]
            gram = torch.exp(-0.5 * (apart.masked_fill(apart.isinf(), 0) / sigma).square())
        size = gram.square().sum((-2, -1))
        if not self.debiased:
            means = gram.mean(-1, keepdim=True)
            return gram - means - means.mT + means.mean(-2, keepdim=True), size
        diagonal = torch.eye(rows, dtype=torch.bool, device=gram.device)
        gram = gram.masked_fill(diagonal, 0)
        sums = gram.sum(-1, keepdim=True) / (rows - 2)
        total = gram.sum((-2, -1), keepdim=True) / ((rows - 1) * (rows - 2))
        return (gram - sums - sums.mT + total).masked_fill(diagonal, 0), size


def read_pair(data: TensorDictBase, key_a: NestedKey, key_b: NestedKey, *, rows: int) -> tuple[Tensor, Tensor]:
    """Two clouds of the same points, in one dtype.

    Raises:
        MissingKeyError: if a key is absent.
        InputError: if either cloud is unusable or their shapes differ in more than the features.
    """
    a, b = read_points(data, key_a, rows=rows), read_points(data, key_b, rows=rows)
    if a.shape[:-1] != b.shape[:-1]:
        raise InputError(
            f"{key_a!r} has shape {tuple(a.shape)} and {key_b!r} {tuple(b.shape)}: they are two representations of "
            "the same points, so all but the last dimension agree"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


class InformationImbalanceEstimator(TensorDictModuleBase):
    """The mean rank, in one representation, of the nearest neighbour in the other, times 2 / N.

    a to b near 0: who is near in a is near in b, so a holds what b holds; near 1: a says nothing about b. The two
    directions differ where one representation keeps less than the other (Glielmo, Zeni, Cheng, Csanyi & Laio
    2022, PNAS Nexus 1). The least value, for identical neighbourhoods, is 2 / N.

    Ties are shared: points equally far from a point have the mean of their ranks, and several nearest neighbours
    count equally. So duplicates are allowed, and where either representation is constant over its points both
    directions are 1.

    Reads ``in_key_a``: ``(..., N, D_a)`` and ``in_key_b``: ``(..., N, D_b)``, N >= 3, with the same leading
    dimensions and N; time and memory grow with N^2. Writes ``out_key_a_to_b`` and ``out_key_b_to_a``: ``(...)``.
    A locked TensorDict is not changed: the results are in the returned shallow copy.

    Args:
        in_key_a: where the first representation is.
        in_key_b: where the second one is.
        out_key_a_to_b: where the imbalance from a to b goes.
        out_key_b_to_a: where the imbalance from b to a goes.
        p: the norm of the distances, at least 1, ``float("inf")`` included.

    Raises:
        MissingKeyError: if the TensorDict lacks a key.
        KeyCollisionError: if a result would replace a representation or the other result.
        InputError: for another shape or dtype, fewer than 3 points, NaN, a and b that do not pair up, p below 1.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> a = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = InformationImbalanceEstimator()(TensorDict({"data_a": a, "data_b": a[:, :1]}))
        >>> bool(found["information_imbalance_a_to_b"] < 0.2 < found["information_imbalance_b_to_a"])
        True
    """

    @checked
    def __init__(
        self,
        *,
        in_key_a: NestedKey = "data_a",
        in_key_b: NestedKey = "data_b",
        out_key_a_to_b: NestedKey = "information_imbalance_a_to_b",
        out_key_b_to_a: NestedKey = "information_imbalance_b_to_a",
        p: float = 2.0,
    ) -> None:
        super().__init__()
        if not p >= 1:
            raise InputError(f"p is the order of a norm, at least 1, got {p}")
        self.in_key_a, self.in_key_b = in_key_a, in_key_b
        self.out_key_a_to_b, self.out_key_b_to_a = out_key_a_to_b, out_key_b_to_a
        self.p = float(p)
        self.in_keys, self.out_keys = [in_key_a, in_key_b], [out_key_a_to_b, out_key_b_to_a]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write both directions for each pair of clouds."""
        a, b = read_pair(tensordict, self.in_key_a, self.in_key_b, rows=3)
        apart_a, apart_b = distances(a, self.p), distances(b, self.p)
        return write_results(
            tensordict,
            {self.out_key_a_to_b: _imbalance(apart_a, apart_b), self.out_key_b_to_a: _imbalance(apart_b, apart_a)},
        )

    @checked
    def interval(
        self, a: Tensor, b: Tensor, groups: Tensor | None = None, *, confidence: float = 0.95
    ) -> tuple[Interval, Interval]:
        """The imbalance from a to b and that from b to a, with intervals; by chance both are 1.

        With groups, neighbours are looked for and ranked among the points of other groups: the next step of an episode
        is near in every representation, so that of few slow episodes unrelated ones have .7 among all points, and 1
        among those of others. Without, the estimate is that of a call. Of 80 independent points, and of 10 episodes of
        12 steps, the intervals hold the 1 of unrelated representations 95 times in 100, and the mean of related ones 93
        to 95 times (``test_imbalance_intervals``).

        Args:
            a, b: two representations of the same inputs, ``(N, D_a)`` and ``(N, D_b)``.
            groups: the group of each point, such as its episode; each its own unless given.
            confidence: of the intervals.

        Raises:
            InputError: as of a call, or for several clouds.

        Example:
            >>> a = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
            >>> b = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
            >>> found, _ = InformationImbalanceEstimator().interval(a, b)
            >>> 1 in found, found.high - found.low < 0.5
            (True, True)
        """
        first, second = read_pair(TensorDict({"a": a, "b": b}), "a", "b", rows=3)
        if first.ndim != 2:
            raise InputError(f"intervals are of two clouds, (N, D) each, got {tuple(a.shape)}: one call for each pair")
        numbers = torch.from_numpy(pair_up(len(first), groups))
        apart = [distances(one.detach().double().cpu(), self.p) for one in (first, second)]
        if int(numbers.max()) > 0:
            apart = [one.masked_fill(numbers[:, None] == numbers, math.inf) for one in apart]
        found = []
        for source, target in (apart, apart[::-1]):
            near = source == source.amin(-1, keepdim=True)
            terms, influences = _rank_terms(near, target)
            found.append(spread_interval(float(terms.mean()), influences, near, groups, confidence))
        return found[0], found[1]


def _imbalance(source: Tensor, target: Tensor) -> Tensor:
    """2 / N times the mean rank in ``target`` of the nearest neighbours in ``source``; both ``(..., N, N)``."""
    ordered = target.sort(-1).values
    first = torch.searchsorted(ordered, target)
    last = torch.searchsorted(ordered, target, right=True)
    ranks = (first + 1 + last).to(source.dtype) / 2
    chosen = (source == source.amin(-1, keepdim=True)).to(source.dtype)
    return (chosen * ranks).sum(-1).div(chosen.sum(-1)).mean(-1) * (2 / source.shape[-1])


def _rank_terms(near: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point the scaled rank in ``target`` of those that are near, and what it adds to the mean, ``(N,)`` each.

    A point adds its own rank, and one to the rank of each point's neighbour that it is nearer than.
    """
    ordered, order = target.sort(-1)
    weights = near.to(target) / near.sum(-1, keepdim=True)
    sums = torch.nn.functional.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    first = sums.gather(-1, torch.searchsorted(ordered, target))
    last = sums.gather(-1, torch.searchsorted(ordered, target, right=True))
    below = 1 - (first + last) / 2  # of the neighbours, the share that is further than each point; a tie is a half
    below = below.masked_fill(target.isinf(), 0)
    scale = 2 / (target.isfinite().to(target).sum(-1) + 1)
    terms = scale * (below.sum(-1) + 0.5)
    return terms, terms + (scale[:, None] * below).sum(0)
