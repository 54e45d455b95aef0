"""Inputs that have a gradient: floats, and what a policy reads as numbers although it is stored as integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, MissingKeyError, nearest


def require_inputs(what: str, keys: Iterable[NestedKey], known: Sequence[NestedKey], kind: str = "an input") -> None:
    """Refuse a key that an argument names and that is no input of the policy."""
    for key in keys:
        if key not in known:
            raise InputError(f"{what} {key!r}, which is not {kind} of the policy; {nearest(key, known)}")


def explainable_inputs(call: Call, keys: Sequence[NestedKey] | None) -> dict[NestedKey, Tensor]:
    """The inputs to explain, as floats: those asked for, else every input that is not boolean, if there is one.

    Raises:
        InputError: if an integer input cannot be explained as floats, or one is complex.
    """
    if keys is None:
        noise = call.policy._hooked.noise
        known = {key: call.inputs.get(key) for key in call.policy.policy_in_keys if key not in noise}
        require_all_there(call)
        tensors = {key: value for key, value in known.items() if isinstance(value, Tensor)}
        # Booleans beside other inputs are masks; a policy that sees nothing else decides by them.
        keys = [key for key, value in tensors.items() if value.dtype != torch.bool] or list(tensors)
    chosen = {}
    for key in keys:
        value = call.inputs.get(key)
        if value is None:
            raise MissingKeyError(f"{key!r} is to be explained, and the data does not hold it: the policy does without")
        if value.is_complex():
            raise InputError(
                f"the complex input {key!r} ({value.dtype}) has no gradient as one number: let the policy read real "
                "and imaginary parts (torch.view_as_real), or leave it out with inputs=[...]"
            )
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
            _require_same_outputs(call, key, value)
        chosen[key] = value
    return chosen


def require_all_there(call: Call) -> None:
    """Raise if everything is to be explained, and something that the policy can do without is not there."""
    absent = [key for key in call.policy._hooked.optional if key not in call.inputs]
    if absent:
        there = [key for key in call.policy.policy_in_keys if key in call.inputs]
        raise MissingKeyError(
            f"the policy can do without {absent[0]!r}, which the data lacks, so nothing can be said of it: name "
            f"what is to be explained, inputs={there}"
        )


def _require_same_outputs(call: Call, key: NestedKey, floats: Tensor) -> None:
    """An integer input is explained as floats only where the policy computes the same from them."""
    remedy = (
        f"the integer input {key!r} ({call.inputs[key].dtype}) cannot be explained as numbers; explain the output of "
        "the module that reads it with input_modules=[path], use Occlusion, which needs no gradient, or leave it out "
        "with inputs=[...]"
    )
    with torch.no_grad():
        expected = call.replay().outputs
        try:
            found = call.replay({key: floats}).outputs
        except Exception as error:  # whatever the user's network raises, its own checks of the dtype included
            raise InputError(f"{remedy} ({type(error).__name__}: the module does not accept floats)") from error
    for name in call.policy.policy_out_keys:
        value = expected.get(name, None)
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.equal(value, found.get(name)):
            raise InputError(f"{remedy} (the output {name!r} differs when it is given as floats)")
