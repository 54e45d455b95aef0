"""The maximum-likelihood estimate of intrinsic dimension around each point."""

from __future__ import annotations

from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.local import LocalDimensionEstimator
from tdhook_rl.latent.dimension_estimation.neighbours import nearest_neighbours, refuse_duplicates

__all__ = ["LocalKnnDimensionEstimator"]


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
        logs = (found[..., -1:] / found[..., :-1]).log().sum(-1)
        if bool((logs == 0).any()):
            raise InputError(
                f"{int((logs == 0).sum())} points of {self.in_key!r} have {k} neighbours at one distance, as on a "
                "grid: the ratios of distances say nothing about the dimension; take a larger k"
            )
        return (k - 2) / logs
