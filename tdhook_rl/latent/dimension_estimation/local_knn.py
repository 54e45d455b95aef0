"""The maximum-likelihood estimate of intrinsic dimension around each point."""

from __future__ import annotations

from typing import Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import (
    check_k,
    check_keys,
    nearest_neighbours,
    read_points,
    refuse_duplicates,
    resolve_k,
    write_results,
)

__all__ = ["LocalKnnDimensionEstimator"]


class LocalKnnDimensionEstimator(TensorDictModuleBase):
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

    @checked
    def __init__(
        self, *, in_key: NestedKey = "data", out_key: NestedKey = "dimension", k: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        check_k(k, least=3)
        self.in_key, self.out_key, self.k = in_key, out_key, k
        self.in_keys, self.out_keys = [in_key], [out_key]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the dimension around each point."""
        points = read_points(tensordict, self.in_key, rows=4)
        k = resolve_k(self.k, points, self.in_key, least=3, reserve=1)
        found, _ = nearest_neighbours(points, k)
        refuse_duplicates(found[..., 0], self.in_key, what="another point")
        logs = (found[..., -1:] / found[..., :-1]).log().sum(-1)
        if bool((logs == 0).any()):
            raise InputError(
                f"{int((logs == 0).sum())} points of {self.in_key!r} have {k} neighbours at one distance, as on a "
                "grid: the ratios of distances say nothing about the dimension; take a larger k"
            )
        return write_results(tensordict, {self.out_key: (k - 2) / logs})
