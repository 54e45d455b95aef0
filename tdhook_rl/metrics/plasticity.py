"""What a layer has left to learn with: dormant units, ranks of its features, and how much decisions churn."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError


@checked
def dormant_units(activations: Tensor, tau: float = 0.025, *, axis: int | None = None) -> Tensor:
    """Which units of a layer are dormant (Sokar, Agarwal, Castro & Evci 2023, ICML).

    The score of a unit is its mean absolute activation over that of the average unit of its layer; at most ``tau``
    makes it dormant. A layer that is silent throughout is dormant as a whole. The units of feature maps are channels.

    Args:
        activations: ``(rows, ..., units)``, such as ``(rows, agents, units)``; four axes without ``axis`` are
            ``(rows, channels, height, width)``.
        tau: the threshold: 0.025, or 0 for units that never act at all.
        axis: the one of the units, where it is another: 1 for sequences ``(rows, channels, length)``.

    Returns:
        ``(units,)``, bool.

    Raises:
        InputError: for another shape or axis, no rows, NaN, or a negative ``tau``.

    Example:
        >>> dormant_units(torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]))
        tensor([False,  True, False])
    """
    if tau < 0:
        raise InputError(f"tau= is a share of the average activation, at least 0; got {tau}")
    sizes = _checked(activations).abs()
    if axis is None:
        axis = 1 if sizes.ndim == 4 else -1
    if not -sizes.ndim < axis < sizes.ndim or axis == 0:
        raise InputError(f"axis={axis} of {tuple(sizes.shape)} does not hold units: axis 0 are the rows")
    means = sizes.movedim(axis, -1).flatten(0, -2).mean(0)
    return means <= tau * means.mean()


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
    if not 0 <= delta < 1:
        raise InputError(f"delta= is a share, at least 0 and below 1; got {delta}")
    values = torch.linalg.svdvals(_checked(activations).flatten(1))
    total = values.sum()
    if total == 0:
        return 0
    # Rounding may leave the sum of all a little below what is asked.
    return min(int((values.cumsum(0) < (1 - delta) * total).sum()) + 1, len(values))


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
    values = torch.linalg.svdvals(_checked(activations).flatten(1))
    if values.sum() == 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


@checked
def action_churn(before: Tensor, after: Tensor) -> float:
    """In what share of states the greedy action has changed (Schaul, Barreto, Quan & Ostrovski 2022, NeurIPS).

    Args:
        before, after: the greedy actions in the same states: ``(states,)`` of indices, ``(states, actions)`` one-hot,
            or ``(states, dimensions)`` of a deterministic continuous policy, of which any change counts.

    Returns:
        the share.

    Raises:
        InputError: if the two do not pair up, or there are none.

    Example:
        >>> action_churn(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 1]))
        0.25
    """
    if before.shape != after.shape or not before.numel():
        raise InputError(
            f"churn compares the actions of the same states, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    return float((before != after).reshape(len(before), -1).any(-1).double().mean())


def _checked(activations: Tensor) -> Tensor:
    if activations.ndim < 2 or not activations.shape[0] or not activations.is_floating_point():
        raise InputError(
            f"activations are floats with a row for each state, got {tuple(activations.shape)} ({activations.dtype})"
        )
    if not bool(torch.isfinite(activations).all()):
        raise InputError("activations hold NaN or infinite entries: leave these rows out")
    return activations.detach().double()
