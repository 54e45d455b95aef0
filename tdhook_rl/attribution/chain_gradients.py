"""Gradients of chains of known layers, for targets that are linear in the output: no graph is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.undefined import defined_rows, nan_undefined_rows, surely_finite
from tdhook_rl.calls.chains import Record, chain_layers
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.targets import DefaultTarget, LinearTarget

__all__ = ["chain_gradients", "is_linear"]


def is_linear(targets: Sequence[TargetFunction]) -> bool:
    """Whether all targets are of the classes whose slope is known; a subclass may compute something else."""
    return all(type(target) in (LinearTarget, DefaultTarget) for target in targets)


def chain_gradients(question: Question) -> list[Attributed] | None:
    """For each target its gradient with respect to the one input; ``None`` if there is another way only."""
    call, inputs, sites, targets, _, _, weights = question
    if len(inputs) != 1 or sites or not is_linear(targets):
        return None
    chain = call.chain or _replayed_chain(question)
    if chain is None:
        return None
    found: list[Attributed] = []
    for target in targets:
        gradient = _chain_gradient(call, chain, target, weights)
        if gradient is None:
            return None
        found.append((dict.fromkeys(inputs, gradient), {}))
    return found


def _replayed_chain(question: Question) -> tuple[Pass, Record] | None:
    """Run the policy on inputs, one of which it has; ``None`` if it is no chain just now."""
    call, inputs, stored = question.call, question.inputs, question.stored
    policy = call.policy
    if not policy._hooked.is_chain:
        return None
    ((key, value),) = inputs.items()
    value = value.detach()
    layers = chain_layers(policy, value)
    if layers is None:
        return None
    data = call.data if stored is None else stored
    out_keys = policy.policy_out_keys
    try:
        with torch.no_grad():
            record = Record(layers, value)
        outputs = TensorDict({}, batch_size=data.batch_size).set(key, value).set(out_keys[0], record.output)
    except RuntimeError:  # which the policy says in its own words
        return None
    if call.as_it_was(inputs, stored):
        call.replayed = outputs
    return Pass(outputs, data, [], out_keys, {}), record


def _chain_gradient(
    call: Call, chain: tuple[Pass, Record], target: TargetFunction, weights: Tensor | None
) -> Tensor | None:
    """The gradient of a target with respect to the one input; ``None`` if the target is not linear in the output."""
    run, record = chain
    with torch.no_grad():
        outer = target.slope(run)  # type: ignore[attr-defined]
        if outer is None:
            return None
        if weights is not None:
            outer = outer * weights.to(outer.dtype).reshape((*weights.shape, *(1,) * (outer.ndim - weights.ndim)))
        found = record.pull(outer)
        # Where every output is finite, so is what is linear in them; but a sum may overflow in half precision.
        if outer.dtype.itemsize < 4 or not surely_finite(record.output):
            found = nan_undefined_rows(defined_rows(call, target(run)), found)
    return found
