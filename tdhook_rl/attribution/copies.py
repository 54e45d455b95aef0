"""Gradients of several targets from one pass over as many copies of the rows, and one backward.

Small networks spend their time on calls, not on arithmetic: one backward over eight copies takes little more than one
over the rows, and eight take eight times as long. Each copy is explained by a target of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.attribution.question import Question, TargetFunction
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.calls.repeatable import coupled
from tdhook_rl.errors import TdhookError
from tdhook_rl.replaying.batching import repeat_rows

#: Rows of all copies times weights of the policy, about what one of them is multiplied by: up to some milliseconds.
WORK = 1 << 24

#: By the ``id`` of a target the target, and its gradient of each input.
Gradients = dict[int, tuple[TargetFunction, dict[NestedKey, Tensor]]]


def of_copies(question: Question) -> Gradients:
    """The gradients of all targets of the methods that share the pass of a question.

    Returns:
        nothing where the work is too much for copies to pay, rows meet or are steps of trajectories, or it has to be
        looked at target by target what there is a gradient of.
    """
    call = question.call
    targets = [target for one in call.sharers if one.compiled is None for target in one.targets_of(call)]
    inputs = _shared_inputs(question)
    effects = effects_of(call.policy)
    if len(targets) < 2 or not inputs or not effects.copies or not _pays(call, len(targets)) or coupled(call):
        return {}
    if any(one.horizon != "step" for one in call.sharers):
        return {}
    number = len(targets)
    primals = {key: _copied(value, number, call.data.ndim).requires_grad_() for key, value in inputs.items()}
    try:
        with torch.enable_grad():
            run = call.replay(primals, repeat_rows(call.data, number))
            values = [target(run).reshape(number, -1)[index] for index, target in enumerate(targets)]
            if not all(value.requires_grad for value in values):
                return {}
            total = torch.stack(values).sum()
    except TdhookError:  # the method that asks for it will meet it, and raise
        return {}
    if not surely_finite(total.detach()):
        return {}
    slopes = torch.autograd.grad(total, list(primals.values()), allow_unused=True)
    found = {key: _blocks(slope, number, inputs[key]) for key, slope in zip(primals, slopes, strict=True)}
    if any(blocks is None for blocks in found.values()):
        effects.copies = False  # that will be so each time
        return {}
    if call.compares and call.replayed is None:
        call.keep_last(run.outputs)
    return {
        id(target): (target, {key: blocks[index] for key, blocks in found.items() if blocks is not None})
        for index, target in enumerate(targets)
    }


def _shared_inputs(question: Question) -> dict[NestedKey, Tensor]:
    """What any of the methods explains, as the policy reads it; nothing if an input is explained as something else."""
    call = question.call
    known = {key: call.inputs.get(key) for one in call.sharers for key in one.declared}
    values = {key: one for key, one in known.items() if isinstance(one, Tensor) and one.is_floating_point()}
    as_it_was = all(key in values for key in question.inputs) and call.as_it_was(question.inputs, None)
    return values if as_it_was else {}


def _pays(call: Call, copies: int) -> bool:
    traits = call.policy._hooked.traits
    if call.in_step:  # which gives a copy of the policy, that cannot explain its forward itself, the same bits
        return False
    if traits.convolutional or traits.read_trajectories(call.policy) or not call.batch_size.numel():
        return False
    return call.batch_size.numel() * copies * traits.weights <= WORK


def _copied(value: Tensor, copies: int, dims: int) -> Tensor:
    return value.detach().expand(copies, *value.shape).flatten(0, dims).contiguous()


def _blocks(slope: Tensor | None, number: int, value: Tensor) -> Sequence[Tensor] | None:
    """The gradient of each target; ``None`` where one is zero: perhaps no gradient has reached it, and that is NaN."""
    if slope is None or not bool((slope.reshape(number, -1) != 0).any(1).all()):
        return None
    return slope.reshape(number, *value.shape).unbind()
