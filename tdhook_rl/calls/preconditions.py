"""What a call needs, said in words where it is not there: a hooked policy, a TensorDict, one dtype and one device."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from tdhook_rl.arguments.keys import get_entry, is_tensordict, key_parts
from tdhook_rl.errors import ContextError, InputError, PreparationError, listed
from tdhook_rl.internals.torch_names import held_parameters


def require_hooked(policy: Any, what: str) -> None:
    """Refuse a policy that was not prepared.

    Raises:
        PreparationError: for a plain policy, a context that was not entered, or no policy at all.
    """
    got = f"a plain {type(policy).__name__}"
    if isinstance(policy, type):
        got = f"the class {policy.__name__}"
    else:
        try:
            _ = policy.annotate, policy.result_keys
            return
        except ContextError:  # what it answers whatever it is asked
            got = "a context that was not entered"
        except AttributeError:
            pass
    raise PreparationError(
        f"{what} takes a hooked policy, got {got}: with Saliency().prepare(policy) as hooked: ... gives one, and so "
        "does Saliency().prepare(policy, return_context=False), which stays hooked without a block"
    )


def require_data(data: Any, what: str) -> None:
    """Refuse data that is no TensorDict.

    Raises:
        InputError: for a dictionary, a tensor, or whatever else.
    """
    if is_tensordict(data) or is_tensor_collection(data):
        return
    remedy = "make one, TensorDict({key: tensor, ...}, batch_size=[rows])"
    if isinstance(data, dict):
        remedy = "TensorDict(data, batch_size=[rows]) makes one of the dict"
    elif isinstance(data, Tensor):
        remedy = "TensorDict({key: tensor}, batch_size=[rows]) gives the tensor a name"
    name = type(data).__name__
    raise InputError(f"{what} takes a TensorDict, got a {name.lower() if isinstance(data, Tensor) else name}: {remedy}")


def require_rows(count: Any, name: str) -> None:
    """Refuse a number of rows at once that is none.

    Raises:
        InputError: for what is not ``None`` or a positive integer.
    """
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise InputError(f"{name} is a positive number of rows, or None for all at once; got {count!r}")


def another_dtype_or_device(policy: nn.Module, data: TensorDictBase, error: Exception) -> InputError | None:
    """What to say of torch's error where inputs are no tensors, or have another dtype or device than the weights."""
    if not isinstance(error, (RuntimeError, TypeError, ValueError)):
        return None
    weights = [one for one in held_parameters(policy).values() if one.is_floating_point()]
    if not weights:
        return None
    dtypes, devices = {one.dtype for one in weights}, {one.device for one in weights}
    for key in policy.policy_in_keys:  # type: ignore[union-attr, operator]
        value = get_entry(data, key)
        if isinstance(value, TensorDictBase):
            inside = [(*key_parts(key), *key_parts(one)) for one in value.keys(True, True)]
            return InputError(
                f"the policy reads {key!r}, and the data has a TensorDict there, of {listed(map(repr, inside), 6)}: "
                f"give the policy the key of a tensor ({error})"
            )
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


#: How tensordict says that a forward returns another number of tensors than there are keys.
_OTHER_COUNT = ("more out_keys than tensors", "more tensors (len(")


def other_keys(policy: nn.Module, error: Exception) -> InputError | None:
    """What to say where a forward takes or returns another number of tensors than there are keys."""
    wraps = bool(policy._hooked.wraps)
    whose = type(policy.module).__name__ if wraps else "a module of the policy"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _OTHER_COUNT):
        keys = f"out_keys={policy.policy_out_keys!r}" if wraps else "its out_keys"  # type: ignore[operator]
        few = _OTHER_COUNT[0] in str(error)
        return InputError(
            f"{whose} returns {'fewer' if few else 'more'} tensors than {keys} names: give one key for each tensor "
            "that its forward returns"
        )
    if wraps and isinstance(error, TypeError):
        given = list(policy.policy_in_keys)  # type: ignore[arg-type]
        try:
            inspect.signature(policy.module.forward).bind(*given)  # type: ignore[union-attr, arg-type]
        except TypeError as wrong:
            return InputError(
                f"{whose}.forward is called with the entries of in_keys={given!r}, which it does not take ({wrong}): "
                "give one key for each of its arguments"
            )
        except ValueError:  # a builtin without a signature
            pass
    return None


def _names(found: set[Any]) -> str:
    return " and ".join(sorted(map(str, found)))
