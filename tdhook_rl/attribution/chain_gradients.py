"""Gradients of chains of known layers, without a graph: of what is linear in their output, or decided by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.undefined import defined_rows, nan_undefined_rows
from tdhook_rl.calls.chains import Chain, Record, chain_layers
from tdhook_rl.calls.heads import HeadPass, is_decided_by
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.calls.writing import set_tensor
from tdhook_rl.internals.tensordict_names import new_unsafe
from tdhook_rl.targets import DefaultTarget, LinearTarget, OwnTarget


def is_linear(targets: Sequence[TargetFunction]) -> bool:
    """Whether all targets are of the classes whose slope is known; a subclass may compute something else."""
    return all(type(target) in (LinearTarget, DefaultTarget) for target in targets)


def chain_gradients(question: Question) -> list[Attributed] | None:
    """For each target its gradient with respect to the one input; ``None`` if there is another way only."""
    call, inputs, sites, targets, _, _, weights, _ = question
    chain = call.policy._hooked.chain
    if chain is None or len(inputs) != 1 or sites:
        return None
    if chain.head is not None:
        return _actor_gradients(question, chain)
    if not is_linear(targets):
        return None
    recorded = call.chain or _replayed_chain(question)
    if recorded is None:
        return None
    found: list[Attributed] = []
    for target in targets:
        gradient = _chain_gradient(call, recorded, target, weights)
        if gradient is None:
            return None
        found.append((dict.fromkeys(inputs, gradient), {}))
    return found


def _replayed_chain(question: Question) -> tuple[Pass, Record] | None:
    """Run the policy on inputs, one of which it has; ``None`` if it is no chain just now."""
    call, inputs, stored = question.call, question.inputs, question.stored
    record = _record(question)
    if record is None:
        return None
    data = call.data if stored is None else stored
    out_keys = call.policy.policy_out_keys
    outputs = new_unsafe({}, batch_size=data.batch_size)
    set_tensor(outputs, next(iter(inputs)), record.input)
    set_tensor(outputs, out_keys[0], record.output)
    if call.as_it_was(inputs, stored):
        call.replayed = outputs
    return Pass(outputs, data, [], out_keys, {}), record


def _record(question: Question) -> Record | None:
    """A run of the policy's chain on the one input; ``None`` if it is no chain just now."""
    (value,) = question.inputs.values()
    value, call = value.detach(), question.call
    if call.kept_record is not None and question.shares and call.kept_record[0].data_ptr() == value.data_ptr():
        return call.kept_record[1]
    layers = chain_layers(question.call.policy, value)
    if layers is None:
        return None
    try:
        with torch.no_grad():
            record = Record(layers, value)
        if question.shares and len(call.sharers) > 1:
            call.kept_record = value, record
        return record
    except RuntimeError:  # which the policy says in its own words
        return None


def _actor_gradients(question: Question, chain: Chain) -> list[Attributed] | None:
    """The same of a policy that decides by the output of a chain."""
    call, inputs, _, targets, _, _, weights, _ = question
    stored = call.data if question.stored is None else question.stored
    if not all(isinstance(target, (OwnTarget, DefaultTarget)) for target in targets):
        return None  # a function of the user's may differentiate by itself
    if not is_decided_by(call, chain, stored):
        return None
    record = _record(question)
    # Parameters that are no numbers are said by the distribution; masked logits go their own way as well.
    if record is None or record.output.shape[:-1] != stored.batch_size or not surely_finite(record.output):
        return None
    head = HeadPass(call, chain, inputs, record.output, stored)
    found: list[Attributed] = []
    for target in targets:
        gradient = _head_gradient(head, record, target, weights)
        if gradient is None:
            return None
        found.append((dict.fromkeys(inputs, gradient), {}))
    if not call.in_step and call.as_it_was(inputs, question.stored):
        call.replayed = head.outputs()
    return found


def _head_gradient(head: HeadPass, record: Record, target: TargetFunction, weights: Tensor | None) -> Tensor | None:
    with torch.no_grad():
        outer = target.head_slope(head)  # type: ignore[attr-defined]
        if outer is not None and weights is not None:
            outer = outer * weights.to(outer.dtype).unsqueeze(-1)
    if outer is None:
        with torch.enable_grad():
            value = target(head.run())
            total = value.sum()
        if not value.requires_grad or not surely_finite(total.detach()):
            return None
        explained, given = (total, None) if weights is None else (value, weights.to(value.dtype))
        (outer,) = torch.autograd.grad(explained, head.leaf, given, retain_graph=True, allow_unused=True)
    if outer is None:
        return None
    with torch.no_grad():
        return record.pull(outer)


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
