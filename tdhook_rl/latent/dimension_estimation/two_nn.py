"""The two-nearest-neighbours estimate of intrinsic dimension: one number for a cloud of points."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import (
    COPIES,
    check_keys,
    nearest_neighbours,
    read_points,
    refuse_copies,
    refuse_duplicates,
    write_results,
)
from tdhook_rl.latent.dimension_estimation.spread import places, read_cloud, spread_interval
from tdhook_rl.statistics import Interval

#: How far the distribution of the ratios may be from that of the dimension that is fitted. Curvature, borders, noise
#: and uneven densities make .06 of it, parts of several dimensions .12, near-duplicates of a tenth of the points .14.
MISFIT = 0.13
#: The share of points whose second neighbour may be further away, relative to the first, than any of as many points of
#: one dimension. A mixture of dimensions makes .02 of it, copies of a fiftieth of the points .04.
FAR = 0.03


def _suffixed(key: NestedKey, suffix: str) -> NestedKey:
    return key + suffix if isinstance(key, str) else (*key[:-1], key[-1] + suffix)


class TwoNnDimensionEstimator(TensorDictModuleBase):
    """Intrinsic dimension from the ratio of the distances to the two nearest neighbours.

    Where the density hardly changes between a point and its second neighbour, the ratio mu of the two distances
    has the distribution F(mu) = 1 - mu^(-d). The slope through the origin of -log(1 - F) against log(mu), with
    the empirical F, is the dimension d (Facco, d'Errico, Rodriguez & Laio 2017, Scientific Reports 7:12140).

    Reads ``in_key``: ``(..., N, D)``, N >= 3 points of D features, any leading dimensions; time and memory grow
    with N^2. Writes ``out_key``: ``(...)``; with ``return_xy`` also the fitted points, ``out_key + "_x"`` (log mu,
    increasing) and ``out_key + "_y"`` (-log(1 - F)), both ``(..., kept)``: they lie on a line if the estimate is
    to be trusted. A locked TensorDict is not changed: the result is in the returned shallow copy.

    Args:
        in_key: where the points are.
        out_key: where the dimension goes.
        return_xy: whether to write the fitted points as well.
        eps: two points closer than ``eps`` times the root mean square distance to the centre count as
            duplicates; 0 means equal.
        discard: the share of points with the largest ratios that the fit leaves out, as the paper does (0.1);
            the last point, where 1 - F is zero, is always left out.

    Raises:
        MissingKeyError: if the TensorDict lacks ``in_key``.
        KeyCollisionError: if a result would replace the points.
        InputError: for another shape or dtype, fewer than 3 points, NaN, duplicates, near-duplicates (the ratios are
            not distributed as in any dimension), a regular grid (all ratios are 1), or a batch size that counts the
            points.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
        >>> TwoNnDimensionEstimator()(TensorDict({"data": plane}))["dimension"].round().item()
        2.0
    """

    @checked
    def __init__(
        self,
        *,
        in_key: NestedKey = "data",
        out_key: NestedKey = "dimension",
        return_xy: bool = False,
        eps: float = 0.0,
        discard: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= discard < 1:
            raise InputError(f"discard is a share of the points in [0, 1), got {discard}")
        if not eps >= 0:
            raise InputError(f"eps is a share of the spread of the points, at least 0, got {eps}")
        self.in_key, self.out_key = in_key, out_key
        self.eps, self.discard = eps, discard
        self.in_keys = [in_key]
        self.out_keys = [out_key]
        if return_xy:
            self.out_keys += [_suffixed(out_key, "_x"), _suffixed(out_key, "_y")]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the dimension of each cloud."""
        points = read_points(tensordict, self.in_key, rows=3)
        ratios, _ = self._ratios(points)
        ratios = ratios.sort(-1).values
        x, y, dimension = self._fit(ratios)
        self._require_fit(ratios, dimension)
        return write_results(tensordict, dict(zip(self.out_keys, (dimension, x, y), strict=False)))

    @checked
    def interval(self, points: Tensor, groups: Tensor | None = None, *, confidence: float = 0.95) -> Interval:
        """The dimension of a cloud, with an interval: from what it is when the ratio of each point is left out.

        It says how far the estimate scatters, not how far it is off: borders, curvature and too few points for a high
        dimension move it, and so do the steps of an episode that are nearest to each other. Of 100 and 300 points on
        tori of dimension 1 and 2 it holds the dimension 90 to 98 times in 100 where 95 are promised
        (``test_dimension_intervals``); of dimension 4 the estimate itself is too high at so few points. Compare it with
        that of an untrained network in the same states: dimensions have no level of chance.

        Args:
            points: ``(N, D)``.
            groups: the group of each point, such as its episode; each its own unless given. Neighbours are looked for
                among all points: of other groups alone they are far, and dimensions of few slow episodes come out high.
            confidence: of the interval.

        Raises:
            InputError: as of a call, or for several clouds.

        Example:
            >>> plane = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
            >>> found = TwoNnDimensionEstimator().interval(plane)
            >>> 2 in found, found.high - found.low < 1
            (True, True)
        """
        cloud = read_cloud(points, rows=4)
        ratios, neighbours = self._ratios(cloud)
        ordered = ratios.sort()
        _, _, dimension = self._fit(ordered.values)
        self._require_fit(ordered.values, dimension)
        influences = torch.empty_like(ratios)
        influences[ordered.indices] = (len(ratios) - 1) * (dimension - self._without_each(ordered.values))
        return spread_interval(float(dimension), influences, places(neighbours), groups, confidence)

    def _ratios(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the ratio of both distances ``(..., N)``, and the two neighbours ``(..., N, 2)``."""
        found, neighbours = nearest_neighbours(points, min(COPIES, points.shape[-2] - 1))
        spread = (points - points.mean(-2, keepdim=True)).square().sum(-1).mean(-1, keepdim=True).sqrt()
        refuse_duplicates(found[..., 0], self.in_key, tolerance=self.eps * spread, what="another point")
        refuse_copies(found, self.in_key)
        return (found[..., 1] / found[..., 0]).log(), neighbours[..., :2]

    def _fit(self, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The points of the line and its slope, from ratios in order."""
        rows = ratios.shape[-1]
        kept = max(2, min(rows - 1, int(rows * (1 - self.discard))))
        x = ratios[..., :kept]
        ranks = torch.arange(1, kept + 1, dtype=x.dtype, device=x.device)
        y = (-torch.log1p(-ranks / rows)).expand_as(x)
        squares = x.square().sum(-1)
        if bool((squares == 0).any()):
            raise InputError(
                f"in {self.in_key!r} the two nearest neighbours are equally far from every fitted point, as on a grid: "
                "the ratio of distances says nothing about the dimension; use LocalPcaDimensionEstimator"
            )
        return x, y, (x * y).sum(-1) / squares

    def _without_each(self, ratios: Tensor) -> Tensor:
        """The slope without each of the ratios ``(N,)``, which are in order."""
        place = torch.arange(len(ratios) - 1)
        return self._fit(ratios[place + (place >= torch.arange(len(ratios))[:, None])])[2]

    def _require_fit(self, ratios: Tensor, dimension: Tensor) -> None:
        """Raise if the ratios of a cloud are far from the law of its dimension, as those of near-duplicates are."""
        rows = ratios.shape[-1]
        law = -torch.expm1(-dimension[..., None] * ratios)
        seen = torch.arange(1, rows + 1, dtype=ratios.dtype, device=ratios.device) / rows
        gap = (law - seen).abs().amax(-1)
        # By the law of the median's dimension e^-4 points are out there; few copies bend the law less than that.
        central = math.log(2) / ratios.median(-1, keepdim=True).values
        far = (central * ratios > math.log(rows) + 4).double().mean(-1)
        # By chance the gap (that of Kolmogorov and Smirnov) is hardly ever above 2 / sqrt(N).
        if bool(((gap > max(MISFIT, 2 / rows**0.5)) | (far > max(FAR, 4 / rows))).any()):
            raise InputError(
                f"the distances to the two nearest neighbours in {self.in_key!r} do not follow the law of any "
                f"dimension (their distributions differ by up to {float(gap.max()):.2f}), as where points are "
                "near-duplicates of each other or evenly spaced: drop near-duplicates first, or use "
                "LocalPcaDimensionEstimator with more neighbours than a point has copies"
            )
