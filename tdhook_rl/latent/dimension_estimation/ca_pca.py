"""Intrinsic dimension around each point from its neighbourhood's eigenvalues, corrected for curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_rl.latent.dimension_estimation.local import LocalDimensionEstimator
from tdhook_rl.latent.dimension_estimation.neighbours import local_spectrum, nearest_neighbours, refuse_duplicates

__all__ = ["CaPcaDimensionEstimator"]


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
