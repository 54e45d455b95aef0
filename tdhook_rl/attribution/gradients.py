"""Gradients of a target with respect to inputs and inner activations, in one replay.

``torch.autograd.grad`` with respect to the explained tensors only; where autograd is out of reach
(inference mode, compile, inside a functorch transform) ``torch.func.grad`` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.errors import InputError, SiteError, TargetError, nearest
from tdhook_rl.hooks import Runtime, vmap_level
from tdhook_rl.passes import Call, Pass

__all__ = ["explainable_inputs", "gradients"]


def explainable_inputs(call: Call, keys: Sequence[NestedKey] | None) -> dict[NestedKey, Tensor]:
    """The inputs to explain, as floats: those asked for, else every input that is not boolean.

    Raises:
        InputError: if a key is not an input, or an integer input cannot be explained as floats.
    """
    own = call.policy.policy_in_keys
    if keys is None:
        keys = [key for key in own if isinstance(call.inputs[key], Tensor) and call.inputs[key].dtype != torch.bool]
    unknown = [key for key in keys if key not in own]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not an input of the policy; {nearest(str(unknown[0]), map(str, own))}")
    chosen = {key: call.inputs[key] for key in keys}
    floats = {
        key: value if value.is_floating_point() else value.to(torch.get_default_dtype())
        for key, value in chosen.items()
    }
    for key, value in chosen.items():
        if not value.is_floating_point():
            _require_same_outputs(call, key, floats[key])
    return floats


def gradients(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, str],
    target: Callable[[Pass], Tensor],
    stored: TensorDictBase | None = None,
) -> tuple[dict[NestedKey, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Gradients of ``target`` (summed over rows, which do not interact).

    Args:
        call: the call that is explained.
        inputs: the explained inputs, floating point.
        leaves: for each slot of an inner activation that is explained, the name of its site.
        target: maps a replay to one number for each row.
        stored: where the other inputs and the samples come from.

    Returns:
        the gradient of each input, and for each inner activation by slot its gradient and its value.

    Raises:
        TargetError: if no gradient reaches the target.
        SiteError: if an explained module does not run.
    """
    runtime = call.policy._hooked_runtime
    functional = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or vmap_level() >= 0
    if functional:
        if leaves:
            raise InputError("inner activations cannot be explained under inference_mode, compile or vmap")
        return _functional(call, inputs, target, stored), {}
    with torch.enable_grad(), _leaves(runtime, leaves):
        primals = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        value = target(call.replay(primals, stored))
        if not value.requires_grad:
            raise TargetError(_no_path(target))
        for slot, site in leaves.items():
            if slot not in runtime.slots:
                raise SiteError(f"the module {site!r} did not run, so its activation cannot be explained")
        points = [*primals.values(), *(runtime.slots[slot] for slot in leaves)]
        found = torch.autograd.grad(value, points, torch.ones_like(value), allow_unused=True)
    if all(gradient is None for gradient in found):
        raise TargetError(_no_path(target))
    filled = [
        torch.zeros_like(point) if gradient is None else gradient for point, gradient in zip(points, found, strict=True)
    ]
    count = len(primals)
    inner = zip(filled[count:], (point.detach() for point in points[count:]), strict=True)
    return dict(zip(primals, filled[:count], strict=True)), dict(zip(leaves, inner, strict=True))


def _functional(
    call: Call, inputs: Mapping[NestedKey, Tensor], target: Callable[[Pass], Tensor], stored: TensorDictBase | None
) -> dict[NestedKey, Tensor]:
    keys = list(inputs)

    def total(*values: Tensor) -> Tensor:
        value = target(call.replay(dict(zip(keys, values, strict=True)), stored))
        if not value.requires_grad and not torch.compiler.is_compiling():
            raise TargetError(_no_path(target))
        return value.sum()

    values = [inputs[key].detach() for key in keys]
    found = torch.func.grad(total, argnums=tuple(range(len(keys))))(*values)
    return dict(zip(keys, found, strict=True))


@contextmanager
def _leaves(runtime: Runtime, leaves: Mapping[str, str]) -> Iterator[None]:
    runtime.leaves = dict.fromkeys(leaves)
    try:
        yield
    finally:
        runtime.leaves = {}
        for slot in leaves:
            runtime.slots.pop(slot, None)


def _no_path(target: Callable[[Pass], Tensor]) -> str:
    return (
        f"no gradient reaches the target {getattr(target, 'name', target)!s} from the explained inputs: the policy "
        "detaches, rounds or samples on the way (an action has no gradient; its log-probability has)"
    )


def _require_same_outputs(call: Call, key: NestedKey, floats: Tensor) -> None:
    """An integer input is explained as floats only where the policy computes the same from them."""
    remedy = (
        f"the integer input {key!r} ({call.inputs[key].dtype}) cannot be explained as numbers; explain the output of "
        "the module that reads it with input_modules=[path], or leave it out with inputs=[...]"
    )
    with torch.no_grad():
        expected = call.replay().outputs
        try:
            found = call.replay({key: floats}).outputs
        except (RuntimeError, TypeError, IndexError) as error:
            raise InputError(f"{remedy} ({type(error).__name__}: the module does not accept floats)") from error
    for name in call.policy.policy_out_keys:
        value = expected.get(name, None)
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.equal(value, found.get(name)):
            raise InputError(f"{remedy} (the output {name!r} differs when it is given as floats)")
