"""Policies that make several choices at once, by logits or values that come one after the other, or decide on bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import NestedKey
from torch import Tensor
from torch import distributions as D

from tdhook_rl.calls.decisions import decided_by, one_hot_action, require_choice
from tdhook_rl.calls.drawable import Support, require_entries
from tdhook_rl.calls.passes import Pass
from tdhook_rl.errors import TargetError


class Several(NamedTuple):
    """Among how many each choice is, whether each is a bit with one logit, and what was drawn, if it has numbers."""

    sizes: tuple[int, ...]
    bits: bool = False
    drawn: Tensor | None = None


def several_choices(run: Pass, key: NestedKey, values: Tensor) -> Several | None:
    """How the logits or values under a key are divided into choices; ``None`` of one choice.

    A distribution says it by ``choice_sizes``, and stores a number for each choice; a Q-network by ``var_nums``.
    """
    sizes = run.actions.get(key, (None, None))[1]
    if sizes is not None:
        return Several(tuple(sizes))
    decision = decided_by(run, key)
    distribution = None if decision is None else decision.distribution
    while isinstance(distribution, D.Independent):
        distribution = distribution.base_dist
    if decision is None:
        return None
    if isinstance(distribution, D.Bernoulli):
        return Several((1,) * values.shape[-1], bits=True)
    divided = getattr(distribution, "choice_sizes", None)
    return None if divided is None else Several(tuple(divided), drawn=decision.action)


def chosen_entries(run: Pass, values: Tensor, key: NestedKey) -> Tensor:
    """The entries that the stored action chose, as 0 and 1 in the shape of the values; of bits those that are set.

    Raises:
        TargetError: if it names none of them.
    """
    several = several_choices(run, key, values)
    if several is None or (several.drawn is None and not several.bits):
        return one_hot_action(run, values, key)
    if several.bits:
        decision = decided_by(run, key)
        action = None if decision is None else decision.action
        if action is None or action.shape != values.shape:
            return one_hot_action(run, values, key)
        bit = Support(0, 1, whole=True)
        require_entries(run.stored, action, bit.lacks(action), decision.key, bit.said)  # type: ignore[union-attr]
        return action.to(values.dtype)
    action, parts = several.drawn, []
    if action is None or action.shape != (*values.shape[:-1], len(several.sizes)):
        return one_hot_action(run, values, key)  # which says so
    for size, taken in zip(several.sizes, action.unbind(-1), strict=True):
        parts.append(taken.unsqueeze(-1) == torch.arange(size, device=action.device))
        require_choice(run, parts[-1], taken, key)
    return torch.cat(parts, -1).to(values.dtype)


def require_one_choice(run: Pass, values: Tensor, key: NestedKey, who: str) -> None:
    """Raise where several choices are made at once.

    Raises:
        TargetError: says of how many, and what is of them.
    """
    several = several_choices(run, key, values)
    if several is not None and len(several.sizes) > 1:
        kinds = f"{len(several.sizes)} bits" if several.bits else f"{len(several.sizes)} choices, among {several.sizes}"
        raise TargetError(
            f"{who} is of one choice, and {key!r} is of {kinds}, at once: take "
            "Occlusion(target=targets.margin()), which adds their margins up, or another target"
        )
