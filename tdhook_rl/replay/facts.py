"""What computed results, in words and numbers that a manifest can hold and that another process finds again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

#: Longer texts and longer lists are cut.
LONGEST = 200


def facts_of(hooked: Any) -> dict[str, Any]:
    """The methods and their options, the policy and a fingerprint of its tensors, versions, and the time."""
    methods = hooked._hooked.runtime.methods
    return {
        "policy": type(hooked)._base.__name__,
        "parameters": sum(parameter.numel() for parameter in hooked.parameters()),
        "methods": None if methods is None else [described(one) for one in methods],
        "weights": fingerprint(hooked),
        "versions": {name: _version(name) for name in ("tdhook_rl", "torch", "torchrl", "tensordict")},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def fingerprint(hooked: Any) -> str:
    """A number of the parameters, buffers and controls of a hooked policy, to the last bit."""
    summed = hashlib.blake2b(digest_size=16)
    named = [*hooked.named_parameters(), *hooked.named_buffers(), *hooked.controls.items()]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        summed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        summed.update(_content(tensor))
    return summed.hexdigest()


def described(value: Any, depth: int = 6) -> Any:
    """A method, or an option of one, in JSON; the same in every process.

    Example:
        >>> from tdhook_rl import ActivationCaching
        >>> described(ActivationCaching("fc1"))["method"]
        'ActivationCaching'
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value if isinstance(value, (bool, int)) or value is None else repr(value)
    if isinstance(value, str):
        return value[:LONGEST]
    if isinstance(value, Tensor):
        number = hashlib.blake2b(_content(value), digest_size=8).hexdigest()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "content": number}
    if depth == 0:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {str(key)[:LONGEST]: described(one, depth - 1) for key, one in list(value.items())[:LONGEST]}
    if isinstance(value, (Sequence, set, frozenset)):
        found = [described(one, depth - 1) for one in list(value)[:LONGEST]]
        return found if isinstance(value, Sequence) else sorted(found, key=str)
    if is_dataclass(value) and not isinstance(value, type):
        options = {one.name: described(getattr(value, one.name, None), depth - 1) for one in fields(value)}
        return {"method": type(value).__name__, **options}
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"[:LONGEST]
    held = {str(key): described(one, depth - 1) for key, one in sorted(getattr(value, "__dict__", {}).items())}
    return (
        {"method": type(value).__name__, **held} if type(value).__module__.startswith("tdhook_rl") else str(type(value))
    )


def _content(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)).numpy().tobytes()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
