"""Which choices were open to a policy: those that a mask of actions closes take no part in a decision."""

from __future__ import annotations

from tensordict import NestedKey
from torch import Tensor
from torch import distributions as D

from tdhook_rl.calls.decisions import decided_by
from tdhook_rl.calls.passes import Pass
from tdhook_rl.internals.torchrl_names import closed_values, open_by_mask

#: So far below what its logit says, a choice has been closed by whatever the distribution does to its logits.
FAR = 1e4


def closed_choices(run: Pass, key: NestedKey, values: Tensor) -> Tensor:
    """The choices that were not open, in the shape of logits or values as the policy puts them out under ``key``.

    A Q-network writes the lowest number there is in their place; a distribution has a mask, or logits of its own that
    are far below what it was given.
    """
    closed = closed_values(values)
    decision = decided_by(run, key)
    distribution = None if decision is None else decision.distribution
    while isinstance(distribution, D.Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, (D.Categorical, D.OneHotCategorical)):
        return closed
    by_mask = open_by_mask(distribution, values.shape[-1])
    if by_mask is not None and by_mask.ndim <= values.ndim and by_mask.shape[-1] == values.shape[-1]:
        return closed | ~by_mask
    own = distribution.logits.detach()
    return closed | (own < values.detach().log_softmax(-1) - FAR) if own.shape == values.shape else closed
