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
from tdhook_rl.targets import no_path
from tdhook_rl.writing import get_entry

__all__ = ["chain_gradient", "replayed_chain"]

Scalar = Callable[[Pass], Tensor]


def replayed_chain(
    call: Call, inputs: Mapping[NestedKey, Tensor], stored: TensorDictBase | None
) -> tuple[Pass, Record] | None:
    """Run a policy that is a chain on inputs; ``None`` if it is none just now."""
    chain = call.policy._hooked_chain
    layers = None if chain is None else chain.alone()
    if layers is None:
        return None
    with torch.no_grad(), Tape(call.policy._hooked_runtime, list(inputs.values()), layers) as tape:
        run = call.replay(inputs, stored, as_it_was=call.as_it_was(inputs, stored))
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
    slope = getattr(target, "_hooked_slope", None)
    with torch.no_grad():
        outer = None if slope is None else slope(run)
        if outer is None:
            found, value = _nonlinear(run, record, key, target, weights)
        else:
            if weights is not None:
                outer = outer * weights.to(outer.dtype).reshape(*weights.shape, *(1,) * (outer.ndim - weights.ndim))
            found, value = record.pull(outer), None
            if outer.dtype.itemsize < 4:  # a sum of finite outputs may overflow
                value = target(run.own())
        # Where every output is finite, so is what is linear in them.
        if not surely_finite(record.output if value is None else value):
            found = blank(defined_rows(call, target(run.own()) if value is None else value), found)
    return found


def _nonlinear(
    run: Pass, record: Record, key: NestedKey, target: Scalar, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient by autograd, for which the chain is one function of its input; and the target."""
    x = record.input.detach().requires_grad_()
    with torch.enable_grad():
        # Copies, which the target may change in place.
        outputs = run.own().outputs.copy().set(key, x.clone()).set(run.out_keys[0], record.joined(x))
        value = target(replace(run, outputs=outputs, in_keys=None))
    if not value.requires_grad:
        raise TargetError(no_path(target))
    outer = torch.ones_like(value) if weights is None else weights.to(value.dtype)
    (found,) = torch.autograd.grad(value, x, outer, allow_unused=True)
    if found is None:
        raise TargetError(no_path(target))
    return found, value.detach()
