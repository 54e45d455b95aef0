"""Gradients of chains of known layers, without a graph: of what is linear in their output, or decided by it.

A target has a slope, its derivative by the chain's output. The slopes of all targets of a pass, also those of several
methods, go back through the layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.undefined import defined_rows, nan_undefined_rows
from tdhook_rl.calls.chains import Chain, Record, chain_layers
from tdhook_rl.calls.heads import HeadPass, is_decided_by
from tdhook_rl.calls.known_slopes import of_rows
from tdhook_rl.calls.passes import Pass, Slope
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import TdhookError
from tdhook_rl.targets import DefaultTarget, LinearTarget, is_own

#: Rows that go back through the layers at once: those of a batch as often as there are targets. Measured as the rows of
#: a path are.
ROWS = 4096


def is_linear(targets: Sequence[TargetFunction]) -> bool:
    """Whether all targets are of the classes whose slope is known; a subclass may compute something else."""
    for target in targets:
        if type(target) not in (LinearTarget, DefaultTarget):
            return False
    return True


def chain_gradients(question: Question) -> list[Attributed] | None:
    """For each target its gradient with respect to the one input; ``None`` if there is another way only."""
    chain, inputs = question.call.policy._hooked.chain, question.inputs
    if chain is None or len(inputs) != 1 or question.sites:
        return None
    with torch.set_grad_enabled(False):  # half of what entering no_grad() takes
        gradients = _chain_gradients(question) if chain.head is None else _actor_gradients(question, chain)
    if gradients is None:
        return None
    return [(dict.fromkeys(inputs, gradient), {}) for gradient in gradients]


def _chain_gradients(question: Question) -> list[Tensor] | None:
    """Of a policy that is nothing but the chain."""
    call, targets = question.call, question.targets
    if not all(is_linear([one]) or of_outputs(one) for one in targets):
        return None
    recorded = call.chain or _replayed_chain(question)
    if recorded is None:
        return None
    run, record = recorded

    def slopes(targets: Sequence[TargetFunction]) -> list[Tensor | None]:
        return [_of_outputs(one, run, question) if of_outputs(one) else _linear(one, run, question) for one in targets]

    gradients = _pulled(question, record, slopes)
    # Where every output is finite, so is what is linear in them; but a sum may overflow in half precision.
    if gradients is None or (record.output.dtype.itemsize >= 4 and record.is_finite()):
        return gradients
    rows = [defined_rows(call, target(run.lent())) for target in targets]
    if question.defined is not None:
        question.defined.update(enumerate(rows))
    return [nan_undefined_rows(defined, one) for defined, one in zip(rows, gradients, strict=True)]


def of_outputs(target: TargetFunction) -> bool:
    """Whether a target is a function of the user's that is given the outputs of the policy alone."""
    return getattr(target, "of_outputs", False) is True


def _linear(target: TargetFunction, run: Pass, question: Question) -> Tensor | None:
    slope = target.slope(run) if is_linear([target]) else None  # type: ignore[attr-defined]
    return None if slope is None else of_rows(slope.values, question.weights)


def _of_outputs(target: TargetFunction, run: Pass, question: Question) -> Tensor | None:
    """The derivative by the one output, where the graph begins, times the weights of the rows."""
    (key,) = run.out_keys
    leaf = run.outputs.get(key).detach().requires_grad_()
    outputs = tensors_as_entries({key: leaf}, run.outputs.batch_size)
    return _by_leaf(target, Pass(outputs, run.stored, [], run.out_keys, {}), leaf, question.weights)


def _by_leaf(target: TargetFunction, run: Pass, leaf: Tensor, weights: Tensor | None) -> Tensor | None:
    """The derivative of a target by what its graph begins at; ``None`` where it has none, or may be no number.

    A function of the user's that differentiates may want the whole graph, where it is called again.
    """
    try:
        return _differentiated(target, run, leaf, weights)
    except RuntimeError as error:
        if not (of_outputs(target) and _is_of_autograd(error)):
            raise
        return None


def _is_of_autograd(error: RuntimeError) -> bool:
    """Whether it was raised where torch differentiates, and not by code of the user's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("torch.autograd")


def _differentiated(target: TargetFunction, run: Pass, leaf: Tensor, weights: Tensor | None) -> Tensor | None:
    with torch.enable_grad():
        value = target(run.lent() if of_outputs(target) else run)
        total = value.sum()
    if not value.requires_grad or not surely_finite(total.detach()):
        return None
    explained, outer = (total, None) if weights is None else (value, weights.to(value.dtype))
    (found,) = torch.autograd.grad(explained, leaf, outer, retain_graph=True, allow_unused=True)
    return found


def _replayed_chain(question: Question) -> tuple[Pass, Record] | None:
    """Run the policy on inputs, one of which it has; ``None`` if it is no chain just now."""
    call, inputs, stored = question.call, question.inputs, question.stored
    record = _record(question)
    if record is None:
        return None
    data = call.data if stored is None else stored
    out_keys = call.policy.policy_out_keys
    outputs = tensors_as_entries({**dict.fromkeys(inputs, record.input), out_keys[0]: record.output}, data.batch_size)
    if call.as_it_was(inputs, stored):
        call.replayed = outputs
    elif question.own:
        call.keep_last(outputs)
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
        record = Record(layers, value)
        if question.shares and len(call.sharers) > 1 and call.as_it_was(question.inputs, None):
            call.kept_record = value, record
        return record
    except RuntimeError:  # which the policy says in its own words
        return None


def _actor_gradients(question: Question, chain: Chain) -> list[Tensor] | None:
    """Of a policy that decides by the output of a chain."""
    call, inputs, targets = question.call, question.inputs, question.targets
    stored = call.data if question.stored is None else question.stored
    if not all(is_own(target) or of_outputs(target) for target in targets):
        return None  # a function of the user's may differentiate by itself
    if not is_decided_by(call, chain, stored):
        return None
    record = _record(question)
    # Parameters that are no numbers are said by the distribution; masked logits go their own way as well.
    if record is None or record.output.shape[:-1] != stored.batch_size or not record.is_finite():
        return None
    head = record.head = record.head or HeadPass(call, chain, inputs, record.output, stored, question.weights)
    gradients = _pulled(question, record, lambda targets: _slopes(head, targets))
    if gradients is not None and question.own:
        head.keep_last()
    elif (
        gradients is not None and call.replayed is None and not call.in_step and call.as_it_was(inputs, question.stored)
    ):
        call.replayed = head.outputs()
    return gradients


def _pulled(
    question: Question, record: Record, slopes: Callable[[Sequence[TargetFunction]], list[Tensor | None]]
) -> list[Tensor] | None:
    """The gradients of the targets of a question, and beside them of those of the methods that share its pass.

    Args:
        question: what is explained.
        record: the run of the chain.
        slopes: from targets to their derivatives by its output, times the weights of the rows; ``None`` where these
            are not known.

    Returns:
        ``None`` if one of the question's is not known.
    """
    targets, pulled, call = question.targets, record.pulled, question.call
    is_shared = question.shares and len(call.sharers) > 1
    if not is_shared and len(targets) == 1:
        (slope,) = slopes(targets)
        return None if slope is None else [record.pull(slope)]
    passes = call.chain, call.kept_record  # over the call as it is, for all its methods
    if any(id(target) not in pulled for target in targets):
        others = []
        if not pulled and is_shared and any(kept is not None and kept[1] is record for kept in passes):
            others = _of_sharers(question)
        try:
            asked = [*targets, *others]
            found = slopes(asked)
        except TdhookError:  # of another method's, which will meet it itself
            if not others:
                raise
            asked = list(targets)
            found = slopes(asked)
        if any(slope is None for slope in found[: len(targets)]):
            return None
        known = [(target, slope) for target, slope in zip(asked, found, strict=True) if slope is not None]
        for (target, _), gradient in zip(known, _pull(record, [slope for _, slope in known]), strict=True):
            pulled[id(target)] = target, gradient
    return [pulled[id(target)][1] for target in targets]


def _of_sharers(question: Question) -> list[TargetFunction]:
    """What the other methods that share the pass of a question ask for."""
    own = {id(target) for target in question.targets}
    return [
        target
        for one in question.call.sharers
        if one.compiled is None
        for target in one.targets_of(question.call)
        if id(target) not in own and is_own(target)
    ]


def _pull(record: Record, slopes: Sequence[Tensor]) -> list[Tensor]:
    if len(slopes) == 1:
        return [record.pull(slopes[0])]
    at_once = max(1, ROWS // max(1, slopes[0].shape[:-1].numel()))
    if at_once == 1 or not record.stacks():
        return [record.pull(slope) for slope in slopes]
    parts = [record.pull(torch.stack(slopes[start : start + at_once])) for start in range(0, len(slopes), at_once)]
    return [gradient for part in parts for gradient in part.unbind()]


def _slopes(head: HeadPass, targets: Sequence[TargetFunction]) -> list[Tensor | None]:
    """The derivatives of targets by the output of the chain; ``None`` where they are not to be had without a graph.

    Weights come in where the targets begin, as in a graph: a product in another order has other last bits.
    """
    found = [None if of_outputs(target) else target.head_slope(head) for target in targets]  # type: ignore[attr-defined]
    linear = [place for place, (one, target) in enumerate(zip(found, targets, strict=True)) if _asks(one, target)]
    if linear:
        for place, slope in zip(linear, _linear_slopes(head, [targets[place] for place in linear]), strict=True):
            found[place] = slope
    if any(one is None for one in found):
        run = head.run()
        for place, (one, target) in enumerate(zip(found, targets, strict=True)):
            found[place] = _by_leaf(target, run, head.leaf, head.weights) if one is None else one
    return found


def _asks(known: Tensor | None, target: TargetFunction) -> bool:
    return known is None and type(target) is LinearTarget


def _linear_slopes(head: HeadPass, targets: Sequence[TargetFunction]) -> list[Tensor | None]:
    """Of what is linear in what the head is given, or gives."""
    with torch.enable_grad():
        run = head.run()
        slopes: list[Slope | None] = [None if run.supports else one.slope(run) for one in targets]  # type: ignore[attr-defined]
        known = [one._replace(values=head.weighted(one.values)) for one in slopes if one is not None]
        found = iter(head.by_leaf(known))
        return [None if one is None else next(found) for one in slopes]
