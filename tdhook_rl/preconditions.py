"""What a call needs, said in words where it is not there: a hooked policy, a TensorDict, one dtype and one device."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from tdhook_rl.errors import InputError, PreparationError

__all__ = ["another_dtype_or_device", "require_data", "require_hooked"]


def require_hooked(policy: Any, what: str) -> None:
    """Refuse a policy that was not prepared.

    Raises:
        PreparationError: for a plain policy, a context that was not entered, or no policy at all.
    """
    if not (hasattr(policy, "annotate") and hasattr(policy, "result_keys")):
        raise PreparationError(
            f"{what} takes a hooked policy, got a plain {type(policy).__name__}: with Saliency().prepare(policy) as "
            "hooked: ... gives one"
        )


def require_data(data: Any, what: str) -> None:
    """Refuse data that is no TensorDict.

    Raises:
        InputError: for a dictionary, a tensor, or whatever else.
    """
    if is_tensor_collection(data):
        return
    remedy = "make one, TensorDict({key: tensor, ...}, batch_size=[rows])"
    if isinstance(data, dict):
        remedy = "TensorDict(data, batch_size=[rows]) makes one of the dict"
    elif isinstance(data, Tensor):
        remedy = "TensorDict({key: tensor}, batch_size=[rows]) gives the tensor a name"
    name = type(data).__name__
    raise InputError(f"{what} takes a TensorDict, got a {name.lower() if isinstance(data, Tensor) else name}: {remedy}")


def another_dtype_or_device(policy: nn.Module, data: TensorDictBase, error: Exception) -> InputError | None:
    """What to say of an error of torch's that comes of inputs in another dtype, or on another device, than the weights.

    Args:
        policy: the hooked policy.
        data: what it was called with.
        error: what its forward raised.
    """
    if not isinstance(error, (RuntimeError, TypeError, ValueError)):
        return None
    weights = [one for one in policy.parameters() if one.is_floating_point()]
    if not weights:
        return None
    dtypes, devices = {one.dtype for one in weights}, {one.device for one in weights}
    for key in policy.policy_in_keys:  # type: ignore[union-attr, operator]
        value = data.get(key, None)
        if not isinstance(value, Tensor):
            continue
        if value.device not in devices:
            return InputError(
                f"the policy is on {_names(devices)}, but {key!r} is on {value.device}: move one of them ({error})"
            )
        if value.is_floating_point() and value.dtype not in dtypes and not torch.is_autocast_enabled():
            return InputError(
                f"the policy has weights of {_names(dtypes)}, but {key!r} is {value.dtype}: cast the data, or the "
                f"policy before it is prepared ({error})"
            )
    return None


def _names(found: set[Any]) -> str:
    return " and ".join(sorted(map(str, found)))
