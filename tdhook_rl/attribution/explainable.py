"""Inputs that have a gradient: floats, and what a policy reads as numbers although it is stored as integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, MissingKeyError, nearest, warn
from tdhook_rl.sites.known import own_class

#: What TorchRL calls booleans that say where episodes begin and end.
_FLAGS = frozenset(("is_init", "done", "terminated", "truncated", "reset", "_reset"))


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
        keys = unless_masks(call, {key: value for key, value in known.items() if isinstance(value, Tensor)})
    chosen = {}
    for key in keys:
        value = call.inputs.get(key)
        if value is None:
            raise MissingKeyError(f"{key!r} is to be explained, and the data does not hold it: the policy does without")
        chosen[key] = as_floats(call, key, value)
    return chosen


def as_floats(call: Call, key: NestedKey, value: Tensor) -> Tensor:
    """An input as floats, where the policy computes the same from them.

    Raises:
        InputError: if it does not, or the input is complex.
    """
    if value.is_complex():
        raise InputError(
            f"the complex input {key!r} ({value.dtype}) has no gradient as one number: let the policy read real "
            "and imaginary parts (torch.view_as_real), or leave it out with inputs=[...]"
        )
    if value.is_floating_point():
        return value
    floats = value.to(torch.get_default_dtype())
    _require_same_outputs(call, key, value, floats)
    return floats


def unless_masks(call: Call, tensors: Mapping[NestedKey, Tensor]) -> list[NestedKey]:
    """Which inputs are explained where none are named: all but booleans, and these where there is nothing else.

    Beside other inputs they are masks and flags mostly, and it is said, once, of those that may be an observation.
    """
    numbers = [key for key, value in tensors.items() if value.dtype != torch.bool]
    left = [key for key in tensors if key not in numbers and not _is_flag(call, key)]
    said = call.policy._hooked.runtime.said
    if numbers and left and "booleans" not in said and not torch.compiler.is_compiling():
        said.add("booleans")
        warn(
            f"the boolean input {left[0]!r} is left out beside {', '.join(map(repr, numbers))}: where it is something "
            f"that the policy sees, name all that is to be explained, inputs={[*numbers, *left]}; where it is a mask, "
            f"inputs={numbers}"
        )
    return numbers or list(tensors)


def _is_flag(call: Call, key: NestedKey) -> bool:
    """Whether a boolean is called a mask or a flag of episodes, or read by modules that take it for one only."""
    name = key if isinstance(key, str) else key[-1]
    if name in _FLAGS or "mask" in name:
        return True
    readers = [
        child
        for child in call.policy.modules()
        if isinstance(child, TensorDictModuleBase)
        and not isinstance(child, TensorDictSequential)
        and key in child.in_keys
    ]
    return bool(readers) and all(
        own_class(child).__module__.partition(".")[0] in ("torchrl", "tensordict")
        and not isinstance(child, TensorDictModule)
        for child in readers
    )


def require_all_there(call: Call) -> None:
    """Raise if everything is to be explained, and something that the policy can do without is not there."""
    absent = [key for key in call.policy._hooked.optional if key not in call.inputs]
    if absent:
        there = [key for key in call.policy.policy_in_keys if key in call.inputs]
        raise MissingKeyError(
            f"the policy can do without {absent[0]!r}, which the data lacks, so nothing can be said of it: name "
            f"what is to be explained, inputs={there}"
        )


def _require_same_outputs(call: Call, key: NestedKey, value: Tensor, floats: Tensor) -> None:
    remedy = (
        f"the integer input {key!r} ({value.dtype}) cannot be explained as numbers; explain the output of "
        "the module that reads it with input_modules=[path], use Occlusion, which needs no gradient, or leave it out "
        "with inputs=[...]"
    )
    with torch.no_grad():
        expected = call.replay({} if value is call.inputs[key] else {key: value}).outputs
        try:
            found = call.replay({key: floats}).outputs
        except Exception as error:  # whatever the user's network raises, its own checks of the dtype included
            raise InputError(f"{remedy} ({type(error).__name__}: the module does not accept floats)") from error
    for name in call.policy.policy_out_keys:
        output = expected.get(name, None)
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.equal(output, found.get(name)):
            raise InputError(f"{remedy} (the output {name!r} differs when it is given as floats)")
