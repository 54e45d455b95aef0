"""Intrinsic dimension around each point, from the distances to its neighbours or from their eigenvalues."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import (
    check_k,
    check_keys,
    local_spectrum,
    nearest_neighbours,
    read_points,
    refuse_copies,
    refuse_duplicates,
    resolve_k,
    write_results,
)
from tdhook_rl.latent.dimension_estimation.spread import places, read_cloud, spread_interval
from tdhook_rl.statistics import Interval


class LocalDimensionEstimator(TensorDictModuleBase):
    """Base of these estimators: from the k nearest neighbours of each point to a number."""

    #: The fewest neighbours that are enough, and the points of a cloud that are no neighbours.
    least: ClassVar[int]
    reserve: ClassVar[int] = 1

    @checked
    def __init__(
        self, *, in_key: NestedKey = "data", out_key: NestedKey = "dimension", k: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        check_k(k, least=self.least)
        self.in_key, self.out_key, self.k = in_key, out_key, k
        self.in_keys, self.out_keys = [in_key], [out_key]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the dimension around each point."""
        points = read_points(tensordict, self.in_key, rows=self.least + self.reserve)
        k = resolve_k(self.k, points, self.in_key, least=self.least, reserve=self.reserve)
        return write_results(tensordict, {self.out_key: self._dimensions(points, k)})

    @checked
    def interval(self, points: Tensor, groups: Tensor | None = None, *, confidence: float = 0.95) -> Interval:
        """The mean over the points of a cloud of the dimension around each, with an interval.

        It says how far the mean scatters, not how far it is off: borders, curvature, and neighbourhoods that are wide
        for a high dimension move it. Of 100 and 300 points on tori of dimension 1 and 2
        :class:`LocalKnnDimensionEstimator` holds the mean of many such clouds 95 times in 100 or more
        (``test_dimension_intervals``); of counts, which are the same around most points, the interval may be of no
        width, and says so. Compare it with that of an untrained network in the same states: dimensions have no level of
        chance.

        Args:
            points: ``(N, D)``.
            groups: the group of each point, such as its episode; each its own unless given. Neighbours are looked for
                among all points: of other groups alone they are far, and dimensions of few slow episodes come out high.
            confidence: of the interval.

        Raises:
            InputError: as of a call, or for several clouds.

        Example:
            >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
            >>> found = LocalKnnDimensionEstimator(k=20).interval(plane)
            >>> bool(1.8 < found.low < found.estimate < found.high < 2)  # the borders of the square lower it
            True
        """
        cloud = read_cloud(points, rows=self.least + self.reserve)
        k = resolve_k(self.k, cloud, "points", least=self.least, reserve=self.reserve)
        found = self._dimensions(cloud, k)
        near = places(nearest_neighbours(cloud, k)[1])
        return spread_interval(float(found.mean()), found, near, groups, confidence)

    def _dimensions(self, points: Tensor, k: int) -> Tensor:
        """From ``(..., N, D)`` to ``(..., N)``."""
        raise NotImplementedError


class LocalKnnDimensionEstimator(LocalDimensionEstimator):
    """Intrinsic dimension around each point, from the distances to its k nearest neighbours.

    If neighbours arrive as a Poisson process of locally constant rate, the logarithms log(T_k / T_j) of the
    ratios of the distances T_1 <= ... <= T_k are exponential with rate d. The maximum-likelihood estimate, with
    the correction k - 2 that removes its bias, is (k - 2) / sum_{j<k} log(T_k / T_j) (Levina & Bickel 2004, NIPS
    17). One estimate scatters by d / sqrt(k - 3) for k > 3: average over points for the dimension of the cloud.

    Reads ``in_key``: ``(..., N, D)``, N >= 4; time and memory grow with N^2. Writes ``out_key``: ``(..., N)``.
    A locked TensorDict is not changed: the result is in the returned shallow copy.

    Args:
        in_key: where the points are.
        out_key: where the dimensions go.
        k: how many neighbours, from 3 to N - 1; ``"auto"`` takes the square root of N.

    Raises:
        MissingKeyError: if the TensorDict lacks ``in_key``.
        KeyCollisionError: if the result would replace the points.
        InputError: for another shape or dtype, too few points for k, NaN, duplicates, a point whose k neighbours
            are all equally far (a grid).

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
        >>> found = LocalKnnDimensionEstimator(k=20)(TensorDict({"data": plane}))["dimension"]
        >>> found.shape, found.mean().round().item()
        (torch.Size([500]), 2.0)
    """

    least = 3

    def _dimensions(self, points: Tensor, k: int) -> Tensor:
        found, _ = nearest_neighbours(points, k)
        refuse_duplicates(found[..., 0], self.in_key, what="another point")
        refuse_copies(found, self.in_key)
        logs = (found[..., -1:] / found[..., :-1]).log().sum(-1)
        if bool((logs == 0).any()):
            raise InputError(
                f"{int((logs == 0).sum())} points of {self.in_key!r} have {k} neighbours at one distance, as on a "
                "grid: the ratios of distances say nothing about the dimension; take a larger k"
            )
        return (k - 2) / logs


class LocalPcaDimensionEstimator(LocalDimensionEstimator):
    """How many eigenvalues of the covariance of a point and its k nearest neighbours are large.

    ``"ratio"`` counts those above ``alpha`` times the largest (Fukunaga & Olsen 1971, IEEE Transactions on
    Computers C-20). ``"maxgap"`` takes the d with the largest ratio of eigenvalue d to eigenvalue d + 1: it needs
    no threshold, but cannot answer that every direction is used (at most D - 1; 1 if D is 1), and without noise
    the gap below the directions of curvature wins: a sphere in a 3-dimensional subspace of R^10 gives 3, where
    ``"ratio"`` and :class:`CaPcaDimensionEstimator` give 2.

    Reads ``in_key``: ``(..., N, D)``, N >= 3; memory grows with N^2 and N k D. Writes ``out_key``: ``(..., N)``,
    whole numbers as floats, at most min(k, D). Duplicates are allowed as long as k neighbours do not all coincide
    with a point. A locked TensorDict is not changed: the result is in the returned shallow copy.

    Args:
        in_key: where the points are.
        out_key: where the dimensions go.
        k: how many neighbours, from 2 to N - 1 and more than the dimension that is looked for; ``"auto"`` takes
            the square root of N.
        criterion: ``"maxgap"`` or ``"ratio"``.
        alpha: the threshold of ``"ratio"``.

    Raises:
        MissingKeyError: if the TensorDict lacks ``in_key``.
        KeyCollisionError: if the result would replace the points.
        InputError: for another shape or dtype, too few points for k, NaN, a point with k duplicates, an unknown
            criterion.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
        >>> LocalPcaDimensionEstimator(k=10)(TensorDict({"data": plane}))["dimension"].unique()
        tensor([2.])
    """

    least = 2

    @checked
    def __init__(
        self,
        *,
        in_key: NestedKey = "data",
        out_key: NestedKey = "dimension",
        k: int | Literal["auto"] = "auto",
        criterion: Literal["maxgap", "ratio"] = "maxgap",
        alpha: float = 0.05,
    ) -> None:
        super().__init__(in_key=in_key, out_key=out_key, k=k)
        if criterion not in ("maxgap", "ratio"):
            raise InputError(f"a criterion is 'maxgap' or 'ratio', got {criterion!r}")
        if not 0 < alpha < 1:
            raise InputError(f"alpha is a share of the largest eigenvalue, between 0 and 1, got {alpha}")
        self.criterion, self.alpha = criterion, alpha

    def _dimensions(self, points: Tensor, k: int) -> Tensor:
        found, index = nearest_neighbours(points, k)
        refuse_duplicates(found[..., -1], self.in_key, what=f"their {k} nearest neighbours")
        spectrum = local_spectrum(points, index, with_itself=True)
        return self._count(spectrum, max(k + 1, points.shape[-1]))

    def _count(self, spectrum: Tensor, size: int) -> Tensor:
        largest = spectrum[..., :1]
        if self.criterion == "ratio":
            return (spectrum > self.alpha * largest).sum(-1).to(spectrum.dtype)
        if spectrum.shape[-1] == 1:
            return torch.ones_like(spectrum[..., 0])
        # Below the rounding error of the singular values, gaps are noise (0/0 where features are exactly zero).
        floor = largest * (torch.finfo(spectrum.dtype).eps * size) ** 2
        levels = spectrum.maximum(floor)
        return (levels[..., :-1] / levels[..., 1:]).argmax(-1).add(1).to(spectrum.dtype)


#: Of eigenvalues over the largest: the least of a direction that counts. The sampling of a ball leaves its smallest
#: above that as long as there are twice as many neighbours as dimensions.
THIN = 0.01


class CaPcaDimensionEstimator(LocalDimensionEstimator):
    """The dimension whose quadratically curved ball explains the eigenvalues of a neighbourhood best.

    The k nearest neighbours lie in a ball whose radius r is the distance to neighbour k + 1. In a flat space of
    dimension d they are uniform in it, and d eigenvalues of their covariance, over r^2, are 1 / (d + 2). Curvature
    feeds the other eigenvalues and takes from these: to second order by (3d + 4) / (2d (d + 1)) times the sum of
    the others. For each d the deficit is given back, and the d is chosen that minimises

        || (lambda_i + c_d tail_d - 1 / (d + 2))_{i <= d} || + 2 tail_d,   tail_d = sum_{i > d} lambda_i.

    Directions in which a neighbourhood hardly extends (less than a hundredth of the variance of its widest one) are no
    candidates: at the end of a line, where the ball is half empty, many small numbers would fit as well as one.

    The idea, calibrating local PCA on a quadratic embedding, is that of Gilbert & O'Neill 2023 (arXiv:2309.13478).
    The constant c_d was derived for this module, and may differ from theirs: it assumes points uniform in volume
    on the graph of a quadratic function, cut at distance r, with principal curvatures that are independent and
    zero on average. It is exact to second order for curves and cylinders; on a sphere, where all curvatures agree,
    the deficit is larger and the correction partial.

    Reads ``in_key``: ``(..., N, D)``, N >= 5; memory grows with N^2 and N k D. Writes ``out_key``: ``(..., N)``,
    whole numbers as floats from 1 to min(k - 1, D). A locked TensorDict is not changed: the result is in the
    returned shallow copy.

    Args:
        in_key: where the points are.
        out_key: where the dimensions go.
        k: how many neighbours, from 3 to N - 2 and more than the dimension that is looked for; ``"auto"`` takes
            the square root of N.

    Raises:
        MissingKeyError: if the TensorDict lacks ``in_key``.
        KeyCollisionError: if the result would replace the points.
        InputError: for another shape or dtype, too few points for k, NaN, a point with k duplicates.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
        >>> CaPcaDimensionEstimator(k=20)(TensorDict({"data": plane}))["dimension"].median().item()
        2.0
    """

    least = 3
    reserve = 2

    def _dimensions(self, points: Tensor, k: int) -> Tensor:
        found, index = nearest_neighbours(points, k + 1)
        refuse_duplicates(found[..., -2], self.in_key, what=f"their {k} nearest neighbours")
        # The point itself is left out: it is the centre by construction, not a draw from the ball.
        spectrum = local_spectrum(points, index[..., :-1], with_itself=False) / found[..., -1:].square()
        thin = spectrum < THIN * spectrum[..., :1]
        misfit = _misfit(spectrum).masked_fill(thin, torch.inf)
        return misfit.argmin(-1).add(1).to(points.dtype)


def _misfit(spectrum: Tensor) -> Tensor:
    """How badly each dimension 1..m explains the eigenvalues ``(..., m)`` of a neighbourhood of radius 1."""
    d = torch.arange(1, spectrum.shape[-1] + 1, dtype=spectrum.dtype, device=spectrum.device)
    head = spectrum.cumsum(-1)
    tail = (head[..., -1:] - head).clamp_min(0)
    shift = (3 * d + 4) / (2 * d * (d + 1)) * tail - 1 / (d + 2)
    # sum_{i <= d} (lambda_i + shift_d)^2, expanded so that no table over pairs (d, i) is needed
    squares = spectrum.square().cumsum(-1) + 2 * shift * head + d * shift.square()
    return squares.clamp_min(0).sqrt() + 2 * tail
