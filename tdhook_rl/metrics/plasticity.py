"""What a layer has left to learn with: dormant units, and ranks of its features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError


@checked
def check_thresholds(*, tau: float = 0.0, delta: float = 0.0) -> None:
    """Refuse what is no ``tau`` of :func:`dormant_units` or no ``delta`` of :func:`effective_rank`."""
    if not tau >= 0:
        raise InputError(f"tau= is a share of the average activation, at least 0; got {tau}")
    if not 0 <= delta < 1:
        raise InputError(f"delta= is a share, at least 0 and below 1; got {delta}")


def dormant_units(activations: Tensor, tau: float = 0.025, *, axis: int | Sequence[int] | None = None) -> Tensor:
    """Which units of a layer are dormant (Sokar, Agarwal, Castro & Evci 2023, ICML).

    The score of a unit is its mean absolute activation over that of the average unit of its layer; at most ``tau``
    makes it dormant. A layer that is silent throughout is dormant as a whole. The units of feature maps are channels.

    Args:
        activations: ``(rows, ..., units)``, such as ``(rows, agents, units)``; four axes without ``axis`` are
            ``(rows, channels, height, width)``.
        tau: the threshold: 0.025, or 0 for units that never act at all.
        axis: the one of the units, where it is another: 1 for sequences ``(rows, channels, length)``; several where
            each of their places is a unit, ``(1, 2)`` for agents that have networks of their own.

    Returns:
        ``(units,)``, bool.

    Raises:
        InputError: for another shape or axis, no rows, NaN, or a negative ``tau``.

    Example:
        >>> dormant_units(torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]))
        tensor([False,  True, False])
    """
    check_thresholds(tau=tau)
    return unit_scores(activations, axis=axis) <= tau


@checked
def unit_scores(activations: Tensor, *, axis: int | Sequence[int] | None = None) -> Tensor:
    """The mean absolute activation of each unit over that of the average unit of its layer: 1 on average.

    Args:
        activations, axis: as of :func:`dormant_units`.

    Returns:
        ``(units,)``, float64; 0 throughout for a layer that is silent throughout.

    Raises:
        InputError: for another shape or axis, no rows, or NaN.

    Example:
        >>> unit_scores(torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, -5.0]])).tolist()
        [0.5, 0.0, 2.5]
    """
    sizes = _checked(activations).abs()
    if axis is None:
        axis = 1 if sizes.ndim == 4 else -1
    axes = [axis] if isinstance(axis, int) else list(axis)
    apart = len({one % sizes.ndim for one in axes}) == len(axes) > 0
    if not apart or not all(-sizes.ndim < one < sizes.ndim and one for one in axes):
        raise InputError(f"axis={axis} of {tuple(sizes.shape)} does not hold units: axis 0 are the rows")
    ends = list(range(-len(axes), 0))
    means = sizes.movedim(axes, ends).flatten(-len(axes)).flatten(0, -2).mean(0)
    average = means.mean()
    return means / average if average > 0 else means


@checked
def dormant_overlap(then: Tensor, now: Tensor) -> float:
    """The share of the units that were dormant then that are dormant now.

    While more and more units are dormant this is the overlap coefficient of Sokar, Agarwal, Castro & Evci 2023 (ICML),
    the common units over the smaller of both sets; but where units wake up, it falls. Units that are dormant by chance
    overlap by the share of units that are dormant now.

    Args:
        then, now: ``(units,)``, bool, as of :func:`dormant_units`.

    Returns:
        the share; NaN if none was dormant then.

    Raises:
        InputError: if the two are not of the same units.

    Example:
        >>> dormant_overlap(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        0.5
    """
    if then.dtype != torch.bool or now.dtype != torch.bool or then.ndim != 1 or then.shape != now.shape:
        raise InputError(
            f"the overlap is of two masks (units,) of the same units, got {tuple(then.shape)} ({then.dtype}) and "
            f"{tuple(now.shape)} ({now.dtype})"
        )
    return float((then & now).sum() / then.sum())


@checked
def effective_rank(activations: Tensor, delta: float = 0.01) -> int:
    """How many singular values of the features hold all but ``delta`` of their sum (Kumar, Agarwal, Ghosh & Levine
    2021, ICLR: srank).

    Args:
        activations: ``(rows, ...)``; features are flattened. The rank is at most the number of rows.
        delta: the share that may be left out.

    Returns:
        the rank; 0 for features that are zero throughout.

    Raises:
        InputError: for no rows, NaN, or ``delta`` outside of 0 to 1.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([4.0, 4.0, 0.01])))
        2
    """
    check_thresholds(delta=delta)
    return Spectrum(activations).effective_rank(delta)


@checked
def entropy_rank(activations: Tensor) -> float:
    """The exponential of the entropy of the features' singular values, as shares (Roy & Vetterli 2007, EUSIPCO).

    A rank without a threshold: n for n equal singular values, 1 for one.

    Args:
        activations: ``(rows, ...)``; features are flattened.

    Returns:
        the rank, a real number; 0 for features that are zero throughout.

    Raises:
        InputError: for no rows, or NaN.

    Example:
        >>> round(entropy_rank(torch.eye(4)), 3)
        4.0
    """
    return Spectrum(activations).entropy_rank()


@checked
def stable_rank(activations: Tensor) -> float:
    """The squared Frobenius norm of the features over their largest squared singular value (Rudelson & Vershynin 2007,
    J. ACM 54).

    At most the rank, and hardly moved by small singular values, which the other ranks count.

    Args:
        activations: ``(rows, ...)``; features are flattened.

    Returns:
        the rank, a real number; 0 for features that are zero throughout.

    Raises:
        InputError: for no rows, or NaN.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 0.0])))
        1.25
    """
    return Spectrum(activations).stable_rank()


class Spectrum:
    """The singular values of the features of a layer, which all ranks are read from.

    Args:
        activations: ``(rows, ...)``; features are flattened.
    """

    def __init__(self, activations: Tensor) -> None:
        self.values = torch.linalg.svdvals(_checked(activations).flatten(1))

    def effective_rank(self, delta: float) -> int:
        total = self.values.sum()
        if total == 0:
            return 0
        # Rounding may leave the sum of all a little below what is asked.
        return min(int((self.values.cumsum(0) < (1 - delta) * total).sum()) + 1, len(self.values))

    def left_over(self, count: int) -> Tensor:
        """The share of the sum that is left without the first, the first two, ... of the values, ``(count,)``."""
        found = torch.zeros(count, dtype=self.values.dtype, device=self.values.device)
        total = self.values.sum()
        if total > 0:
            found[: len(self.values)] = 1 - (self.values.cumsum(0) / total)
            found[len(self.values) - 1 :] = 0.0  # but for rounding
        return found.clamp_min(0.0)

    def entropy_rank(self) -> float:
        total = self.values.sum()
        return 0.0 if total == 0 else float(torch.special.entr(self.values / total).sum().exp())

    def stable_rank(self) -> float:
        largest = self.values.max()
        return 0.0 if largest == 0 else float((self.values / largest).square().sum())


def _checked(activations: Tensor) -> Tensor:
    if activations.ndim < 2 or not activations.numel() or not activations.is_floating_point():
        raise InputError(
            "activations are floats with a row for each state and a feature at least, got "
            f"{tuple(activations.shape)} ({activations.dtype})"
        )
    if not bool(torch.isfinite(activations).all()):
        raise InputError("activations hold NaN or infinite entries: leave these rows out")
    found = activations.detach().double()
    # Sums of the largest would be infinite; nothing here depends on scale, and a power of two rounds nothing.
    return torch.ldexp(found, -torch.frexp(found.abs().max()).exponent)
