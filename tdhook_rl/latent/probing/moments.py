"""Sums of feature vectors in float64, about a number near their mean, and the linear systems they pose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.errors import InputError, warn

M = TypeVar("M", bound="Moments")

#: Rows that are held in float64 at once.
BLOCK = 2048
#: What weights are kept in, which are numbers over features: larger features would leave none of them.
LARGEST = torch.finfo(torch.float32).max
#: Vectors longer than this take more memory for their second moments than most machines have, and minutes.
MOST = 8192
#: A feature that varies by less counts as constant: its weight would be infinite.
SMALLEST = 1e-36


class Moments:
    """The base of the statistics of probes: the second moments of feature vectors.

    Everything is kept about ``shift``, the mean of the first rows, and in float64: features far from zero (an offset
    of 10,000 and a spread of 1) lose nothing to cancellation.

    Args:
        features: the length of a feature vector.
        sources, parts: sums are kept apart for each of so many sources of features, and parts of their rows.

    Attributes:
        shift: ``(*sources, features)``; zeros before the first rows.
        moment: ``(*sources, *parts, features, features)``, the sum of ``(x - shift) (x - shift)^T``.
        resolution: the relative spacing of the coarsest numbers that were added: spread below it is rounding.
    """

    _sums: tuple[str, ...] = ("moment",)

    # Sums that were made in inference mode could not be added to outside it.
    @torch.inference_mode(False)
    def __init__(self, *, features: int, sources: tuple[int, ...] = (), parts: tuple[int, ...] = ()) -> None:
        if features < 1:
            raise InputError(f"a probe needs at least 1 feature, got {features}")
        self.shift = torch.zeros(*sources, features, dtype=torch.float64)
        self.moment = torch.zeros(*sources, *parts, features, features, dtype=torch.float64)
        self.resolution = torch.finfo(torch.float64).eps
        self._begun = False

    @property
    def width(self) -> int:
        """The length of a feature vector."""
        return self.shift.shape[-1]

    # So that sum() of the statistics of workers works, which begins with 0.
    def __radd__(self: M, other: object) -> M:
        return self if other == 0 else NotImplemented

    @torch.inference_mode(False)
    def decay(self, factor: float) -> None:
        """Forget: multiply every sum by a factor between 0 and 1, for features that drift in training."""
        if not 0 <= factor <= 1:
            raise InputError(f"a decay factor lies between 0 and 1, got {factor}")
        for name in self._sums:
            getattr(self, name).mul_(factor)

    def _checked(self, features: Tensor, rows: int) -> Tensor:
        """``(rows, features)`` on the CPU.

        Raises:
            InputError: for another shape, NaN, or features that are too large.
        """
        if features.numel() != rows * self.width:
            raise InputError(
                f"features of shape {tuple(features.shape)} are not {rows} rows of {self.width}: "
                "labels have the batch shape of the features"
            )
        found = features.detach().reshape(rows, self.width).cpu()
        if not surely_finite(found) and not bool(torch.isfinite(found).all()):
            raise InputError("features hold NaN or infinite values; drop those rows first")
        require_size(found, "features")
        return found

    def _blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows about the shift in float64, a block at a time; the second moments are added up here."""
        if not len(rows):
            return
        self._begin(rows)
        for part, block in blocks_about(self.shift, rows):
            self.moment.addmm_(block.T, block)
            yield part, block

    def _begin(self, rows: Tensor) -> bool:
        """Note how fine these rows are, and take the shift of the first ones; whether these are."""
        first, self._begun = not self._begun, True
        if first:
            self.shift = rows[:BLOCK].double().mean(0)
        if rows.is_floating_point():
            self.resolution = max(self.resolution, torch.finfo(rows.dtype).eps)
        return first

    def _merged(self: M, other: M, total: Tensor, rows: Tensor) -> tuple[M, Tensor]:
        """A copy with the moment of another's rows added, about this one's shift; how far the other's shift is away."""
        merged, away = copy.deepcopy(self), other.shift - self.shift
        crossed = torch.outer(total, away)
        merged.resolution = max(self.resolution, other.resolution)
        merged.moment += other.moment + crossed + crossed.T + rows * torch.outer(away, away)
        return merged, away

    def _scale(self, mean: Tensor, variance: Tensor) -> Tensor:
        return spread_of(mean, variance, self.shift, self.resolution)


def require_size(values: Tensor, what: str, largest: float = LARGEST) -> None:
    """Refuse numbers that are too large to be fitted to; what is not finite is another's to refuse.

    Raises:
        InputError: that says how large they are.
    """
    if values.dtype != torch.float64 or not values.numel():
        return
    sizes = torch.nan_to_num(values.detach().abs(), nan=0.0, posinf=0.0)
    if (found := float(sizes.max())) > largest:
        raise InputError(
            f"{what} reach {found:.3g}, and what is fitted here holds up to {largest:.3g}: divide them by a number of "
            "that size first, or leave those rows out"
        )


def spread_of(mean: Tensor, variance: Tensor, shift: Tensor, resolution: float) -> Tensor:
    """The spread of each feature, infinite where it is constant up to rounding; the mean is about the shift."""
    spread = variance.clamp_min(0).sqrt()
    rounding = 0.5 * resolution * (mean + shift).abs()
    say_if_too_small(spread, rounding)
    live = spread > rounding.clamp_min(SMALLEST)
    return torch.where(live, spread, torch.inf)


def say_if_too_small(spread: Tensor, rounding: Tensor) -> None:
    """Warn of features that vary, and by so little that they are taken for constant."""
    if bool(((spread > rounding) & (spread <= SMALLEST)).any()):
        warn(
            f"some features vary by less than {SMALLEST:g}, and count as constant for probes, whose weights of them "
            "float32 would not hold: if something is to be read there, multiply these features by a large number first"
        )


def blocks_about(shift: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows minus a vector in float64, a block at a time, each in the memory of the one before."""
    memory = torch.empty(min(len(rows), BLOCK), rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), BLOCK):
        block = memory[: min(len(rows) - start, BLOCK)]
        block.copy_(rows[start : start + BLOCK]).sub_(shift)
        yield slice(start, start + len(block)), block


def solve_symmetric(matrix: Tensor, right: Tensor, floor: float = 0.0) -> Tensor:
    """``matrix^-1 right`` for a matrix that is positive, or nearly.

    Args:
        matrix: ``(n, n)``, symmetric.
        right: ``(n, k)``.
        floor: what eigenvalues count at least, if the matrix is singular; 0: directions without any are left out, as in
            a least-squares solution of least norm.
    """
    if not len(matrix):
        return right
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if not bool(failed) and bool(diagonal.min() > 1e-7 * diagonal.max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    if floor:
        inverse = 1 / values.clamp_min(floor)
    else:
        smallest = 1e-12 * values.abs().max()
        inverse = torch.where(values > smallest, 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def ridge_weights(covariance: Tensor, cross: Tensor, penalty: float, spread: Tensor | None = None) -> Tensor:
    """Least squares with a penalty on the weights, from covariances.

    Args:
        covariance: ``(features, features)``; changed in place.
        cross: ``(outputs, features)``, of outputs with features.
        penalty: what is added to the diagonal.
        spread: ``(features,)``, of features that are scaled to variance 1 before; infinite for those that do not vary.

    Returns:
        ``(outputs, features)``, of the features as they are.
    """
    if spread is None:
        covariance.diagonal().add_(penalty)
        return solve_symmetric(covariance, cross.T).T
    live = torch.isfinite(spread)
    own = spread[live]
    inner = covariance[live][:, live] / torch.outer(own, own)
    inner.diagonal().add_(penalty)
    weight = torch.zeros_like(cross)
    weight[:, live] = solve_symmetric(inner, (cross[:, live] / own).T).T / own
    return weight


def raw_bias(weight: Tensor, centre: Tensor, at_centre: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as it is stored, in float32, and the bias that gives exactly ``at_centre`` there.

    The bias belongs to the rounded weight and stays float64: with features far from zero, rounding either would shift
    every score.

    Args:
        weight: ``(*sources, outputs, features)``.
        centre: ``(*sources, features)``.
        at_centre: ``(*sources, outputs)``, the scores there.

    Raises:
        InputError: for weights that float32 does not hold.
    """
    stored = weight.float()
    if not surely_finite(stored) and bool((stored.isinf() & weight.isfinite()).any()):
        raise InputError(
            f"the weights of a probe are as large as {float(weight.abs().max()):.3g}, which float32 does not hold: "
            "features vary too little, or the numbers to predict too much; scale them first"
        )
    return stored, at_centre - (stored.double() @ centre[..., None]).squeeze(-1)
