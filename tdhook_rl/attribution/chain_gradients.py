"""Gradients of policies that are a chain of known layers: of their output first, then through the layers.

What the target makes of the output is known where it is linear, and differentiated by autograd elsewhere; no graph of
the layers is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.attribution.undefined import blank, defined_rows, surely_finite
from tdhook_rl.chains import Record, Tape
from tdhook_rl.errors import TargetError
from tdhook_rl.passes import Call, Pass
from tdhook_rl.writing import get_entry

__all__ = ["as_it_was", "chain_gradient", "no_path", "replayed_chain"]

Scalar = Callable[[Pass], Tensor]


def replayed_chain(
    call: Call, inputs: Mapping[NestedKey, Tensor], stored: TensorDictBase | None
) -> tuple[Pass, Record] | None:
    """Run the policy on inputs; ``None`` if somebody has hooked a layer or changed the output meanwhile."""
    tape = Tape(list(inputs.values()), cut=False)
    with torch.no_grad(), tape.recording(call.policy._hooked_runtime):
        run = call.replay(inputs, stored, as_it_was=as_it_was(call, inputs, stored))
    record = tape.only(get_entry(run.outputs, run.out_keys[0]))
    return None if record is None else (run, record)


def chain_gradient(
    call: Call, chain: tuple[Pass, Record], key: NestedKey, target: Scalar, weights: Tensor | None
) -> Tensor:
    """The gradient of a target with respect to the one input, which is under ``key``.

    Raises:
        TargetError: if no gradient reaches the target.
    """
    run, record = chain
    slope = getattr(target, "slope", None)
    with torch.no_grad():
        outer = None if slope is None else slope(run)
        if outer is None:
            found, value = _nonlinear(run, record, key, target, weights)
        else:
            if weights is not None:
                outer = outer * weights.to(outer.dtype).reshape(*weights.shape, *(1,) * (outer.ndim - weights.ndim))
            found, value = record.pull(outer), None
        # Where every output is finite, so is what is linear in them.
        if not surely_finite(record.output if value is None else value):
            found = blank(defined_rows(call, target(run) if value is None else value), found)
    return found


def _nonlinear(
    run: Pass, record: Record, key: NestedKey, target: Scalar, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient by way of the output, and directly where the target reads the input as well; and the target."""
    x, y = record.input.detach().requires_grad_(), record.output.detach().requires_grad_()
    outputs = run.outputs.copy().set(key, x).set(run.out_keys[0], y)
    with torch.enable_grad():
        value = target(replace(run, outputs=outputs))
    if not value.requires_grad:
        raise TargetError(no_path(target))
    outer = torch.ones_like(value) if weights is None else weights.to(value.dtype)
    direct, through = torch.autograd.grad(value, (x, y), outer, allow_unused=True)
    if through is not None:
        through = record.pull(through)
        direct = through if direct is None else through + direct
    return direct, value.detach()


def as_it_was(call: Call, inputs: Mapping[NestedKey, Tensor], stored: TensorDictBase | None) -> bool:
    """Whether a replay on these inputs computes what the call did."""
    return stored is None and all(value.data_ptr() == call.inputs[key].data_ptr() for key, value in inputs.items())


def no_path(target: Scalar) -> str:
    return (
        f"no gradient reaches the target {getattr(target, 'name', target)!s} from the explained inputs: the policy "
        "detaches, rounds or samples on the way (an action has no gradient; its log-probability has)"
    )
