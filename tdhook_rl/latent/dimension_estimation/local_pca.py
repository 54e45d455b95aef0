"""Intrinsic dimension around each point from the eigenvalues of its neighbourhood."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.local import LocalDimensionEstimator
from tdhook_rl.latent.dimension_estimation.neighbours import local_spectrum, nearest_neighbours, refuse_duplicates

__all__ = ["LocalPcaDimensionEstimator"]


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
