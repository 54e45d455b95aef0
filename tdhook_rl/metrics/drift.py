"""How far a network has moved on the same states: greedy actions, action distributions, values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torchrl_names import listed_choices
from tdhook_rl.metrics.untrained import own_generators


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
    if before.shape != after.shape or not before.numel() or not before.ndim:
        raise InputError(
            f"churn compares the actions of the same states, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    return float((before != after).reshape(len(before), -1).any(-1).double().mean())


class Divergence(NamedTuple):
    """How far two action distributions are apart.

    Attributes:
        values: ``(states,)``, in nats.
        samples: how many were drawn in each state; 0 where the divergence is known in closed form.
    """

    values: Tensor
    samples: int


@checked
def policy_divergence(before: Distribution, after: Distribution, *, samples: int = 64, seed: int = 0) -> Divergence:
    """KL(before || after) of the action distributions in each state: policy churn, of Tang & Berseth 2024 (NeurIPS).

    In closed form where torch has one (``kl_divergence``). Otherwise it is estimated from actions of ``before``, the
    same at each call, by the mean of q/p - 1 - log(q/p), which is never negative and varies little where the two are
    close; where ``after`` is far wider, more samples are needed. Independent parts of an action (agents, dimensions,
    the parts of a ``CompositeDistribution``) add up.

    Args:
        before, after: with the states first in their batch shape.
        samples: in each state, where they are needed.
        seed: of the samples; the global generators are left as they are.

    Raises:
        InputError: for distributions of different states, or without a density (``Delta``).

    Example:
        >>> from torch.distributions import Categorical
        >>> even, sure = Categorical(probs=torch.tensor([[0.5, 0.5]])), Categorical(probs=torch.tensor([[0.9, 0.1]]))
        >>> round(policy_divergence(even, sure).values.item(), 4)
        0.5108
    """
    require_counts(samples=samples)
    if isinstance(before, CompositeDistribution) and isinstance(after, CompositeDistribution):
        if before.dists.keys() != after.dists.keys():
            raise InputError(f"one distribution is of {list(before.dists)}, the other of {list(after.dists)}")
        parts = [
            policy_divergence(one, after.dists[key], samples=samples, seed=seed) for key, one in before.dists.items()
        ]
        return Divergence(torch.stack([one.values for one in parts]).sum(0), max(one.samples for one in parts))
    if without_density(before) or without_density(after):
        raise InputError(
            f"{type(before).__name__} and {type(after).__name__} have no density to compare: action_churn compares "
            "what deterministic policies do"
        )
    if before.batch_shape != after.batch_shape or not before.batch_shape:
        raise InputError(
            f"the distributions are of the same states, got batch shapes {tuple(before.batch_shape)} and "
            f"{tuple(after.batch_shape)}"
        )
    first, second = listed_choices(before), listed_choices(after)
    if (first is None) is not (second is None) or (first is not None and not torch.equal(first, second)):
        raise InputError(
            "the distributions list the numbers of their choices (indices=), and not the same ones: make them with "
            "mask= to compare them"
        )
    try:
        found, drawn = kl_divergence(before, after), 0
    except NotImplementedError:
        found, drawn = _sampled(before, after, samples, seed), samples
    return Divergence(found.detach().double().reshape(len(found), -1).sum(-1), drawn)


def without_density(distribution: Distribution) -> bool:
    """Whether all of the probability is on one action."""
    from torchrl.modules import Delta

    return isinstance(distribution, Delta)


def _sampled(before: Distribution, after: Distribution, samples: int, seed: int) -> Tensor:
    with own_generators(seed), torch.no_grad():
        actions = before.sample((samples,))
        ratio = (after.log_prob(actions) - before.log_prob(actions)).double()
    return (torch.expm1(ratio) - ratio).mean(0)


class ValueDrift(NamedTuple):
    """How far values have moved.

    Attributes:
        absolute: the mean absolute change, in units of the value.
        relative: that over the mean absolute value before.
    """

    absolute: float
    relative: float


@checked
def value_drift(before: Tensor, after: Tensor) -> ValueDrift:
    """How far values have moved in the same states: value churn, of Tang & Berseth 2024 (NeurIPS).

    Args:
        before, after: ``(states, ...)``: of states, or of all actions in them.

    Returns:
        the mean absolute change, and the same over the mean absolute value before (NaN where that is 0 throughout).

    Raises:
        InputError: if the two do not pair up, or there are none.

    Example:
        >>> value_drift(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
        ValueDrift(absolute=0.5, relative=0.25)
    """
    if before.shape != after.shape or not before.numel():
        raise InputError(
            f"drift compares the values of the same states, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    before, after = before.detach().double(), after.detach().double()
    change, size = (after - before).abs().mean(), before.abs().mean()
    return ValueDrift(float(change), float(change / size) if size > 0 else float("nan"))
