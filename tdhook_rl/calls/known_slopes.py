"""Common distributions whose log-probability has a known derivative by their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torch import distributions as D

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.chains import has_hook
from tdhook_rl.calls.drawable import within
from tdhook_rl.policies.draws import sample_keys

Slopes = tuple[Tensor, ...] | None


def log_prob_slopes(
    head: Any, keys: Sequence[NestedKey] | None, stored: TensorDictBase, parameters: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """The derivatives of the log-probability of what is stored by the parameters of its distribution.

    Args:
        head: the module that draws.
        keys: the decisions that are meant; ``None`` for all.
        stored: where the sample is.
        parameters: in the order of the ``in_keys`` of the head.

    Returns:
        ``None`` where they are not known, or what is stored is no sample of the distribution.
    """
    known = slopes_of(getattr(head, "distribution_class", None))
    if known is None or has_hook(head.__dict__) or list(head.dist_keys) != known[0]:
        return None
    (key,) = map(unravel_key, sample_keys(head))
    action = get_entry(stored, key)
    if type(action) is not Tensor or not (keys is None or list(map(unravel_key, keys)) == [key]):
        return None
    return known[1](head, action, *parameters)


def of_rows(slope: Tensor, weights: Tensor | None) -> Tensor:
    """A derivative times a weight for each row."""
    if weights is None:
        return slope
    weights = weights if weights.dtype is slope.dtype else weights.to(slope.dtype)
    return slope * weights.reshape((*weights.shape, *(1,) * (slope.ndim - weights.ndim)))


def slopes_of(kind: Any) -> tuple[list[str], Callable[..., Slopes]] | None:
    """By what the parameters of a distribution are called, and its derivatives by them; a class may say it itself.

    It does by ``known_slopes``, a pair of these names and of a function from the module that draws, what was drawn and
    the parameters; a subclass does not.
    """
    found = _known_slopes().get(kind)
    return vars(kind).get("known_slopes") if found is None and isinstance(kind, type) else found


@functools.cache
def _known_slopes() -> dict[type, tuple[list[str], Callable[..., Slopes]]]:
    """By distribution the names of its parameters, and the derivatives by them of what is drawn."""
    import torchrl.modules as rl

    of_choice, of_number = ["logits"], ["loc", "scale"]
    return {
        D.Categorical: (of_choice, _index_slope),
        D.OneHotCategorical: (of_choice, _one_hot_slope),
        rl.OneHotCategorical: (of_choice, _one_hot_slope),
        rl.IndependentNormal: (of_number, _normal_slopes),
        rl.TanhNormal: (of_number, _tanh_normal_slopes),
    }


def _index_slope(head: Any, action: Tensor, logits: Tensor) -> Slopes:
    if action.shape != logits.shape[:-1] or action.is_floating_point() or head.distribution_kwargs:
        return None
    try:
        chosen = torch.zeros_like(logits).scatter_(-1, action.unsqueeze(-1).long(), 1.0)
    except RuntimeError:  # an index of no choice
        return None
    return (chosen - logits.softmax(-1),)


def _one_hot_slope(head: Any, action: Tensor, logits: Tensor) -> Slopes:
    if action.shape != logits.shape or head.distribution_kwargs:
        return None
    action = action.to(logits.dtype)
    chosen = torch.zeros_like(logits).scatter_(-1, action.argmax(-1, keepdim=True), 1.0)
    return (chosen - logits.softmax(-1),) if torch.equal(chosen, action) else None


#: What TanhNormal takes for a scale, and raises at otherwise.
_LEAST_SCALE = 1e-6


def _normal_slopes(head: Any, drawn: Tensor, loc: Tensor, scale: Tensor) -> Slopes:
    return None if head.distribution_kwargs else slopes_of_normal(drawn, loc, scale)


def _tanh_normal_slopes(head: Any, action: Tensor, loc: Tensor, scale: Tensor) -> Slopes:
    bounds = head.distribution_kwargs
    if not (isinstance(bounds, dict) and {"low", "high"} >= set(bounds)):
        return None
    low, high = bounds.get("low", -1.0), bounds.get("high", 1.0)
    if not isinstance(low, Real) or not isinstance(high, Real):
        return None
    edge = 1 - torch.finfo(loc.dtype).resolution
    middle, half = float(high + low) / 2, float(high - low) / 2
    inside = action if (middle, half) == (0, 1) else (action - middle) / half
    if not within(inside, -1.0, 1.0):
        return None
    return slopes_of_normal(inside.clamp(-edge, edge).atanh(), loc, scale)


def slopes_of_normal(drawn: Tensor, loc: Tensor, scale: Tensor) -> Slopes:
    """Of the log-probability of samples of normal distributions by their means and scales."""
    if drawn.shape != loc.shape or drawn.dtype != loc.dtype or not scale.min().item() > _LEAST_SCALE:
        return None
    away = (drawn - loc) / scale
    return away / scale, (away * away - 1) / scale
