"""Tensorclasses as data: run on as the TensorDicts that they are, results in their fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from tensordict import PersistentTensorDict, TensorDict, TensorDictBase, is_tensorclass

from tdhook_rl.batches.annotation import OnMismatch, annotate
from tdhook_rl.batches.keeping import Keep, kept_keys
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError


def call_on_fields(policy: HookedPolicy, data: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a hooked policy on a tensorclass, which is given the outputs and results.

    Raises:
        InputError: if it has no field for one of them.
    """
    _require_fields(policy, data, policy.out_keys)
    output = policy(_entries(data), *args, **kwargs)
    return _filled(data, output, {_root(key) for key in policy.out_keys})


def annotate_fields(
    policy: HookedPolicy,
    data: Any,
    chunk_size: int | None,
    on_mismatch: OnMismatch,
    keep: Keep = None,
    laid_out: str = "",
) -> Any:
    """Annotate a TensorDict, or a tensorclass: what is returned is of its class.

    What lies in an HDF5 file is returned in memory: a copy would be another file, and its own is the caller's.
    """
    if isinstance(data, PersistentTensorDict):
        data = data.to_tensordict()
    if isinstance(data, TensorDictBase) or not is_tensorclass(data):
        return annotate(policy, data, chunk_size, on_mismatch, keep, laid_out)
    kept, held = kept_keys(policy, keep), set(_fields(data))
    _require_fields(policy, data, kept)
    output = annotate(policy, _entries(data), chunk_size, on_mismatch, keep, laid_out)
    return _filled(data.copy(), output, {_root(key) for key in policy.result_keys} & held)


def _entries(data: Any) -> TensorDict:
    """The fields that are set."""
    held = {name: getattr(data, name) for name in _fields(data)}
    return TensorDict({name: value for name, value in held.items() if value is not None}, batch_size=data.batch_size)


def _filled(data: Any, output: TensorDictBase, roots: set[str]) -> Any:
    for root in roots:
        setattr(data, root, output.get(root, None))
    return data


def _require_fields(policy: HookedPolicy, data: Any, keys: Any) -> None:
    absent = sorted({_root(key) for key in keys} - set(_fields(data)))
    if absent:
        fields = ", ".join(f"{name}: TensorDict = None" for name in absent)
        raise InputError(
            f"the tensorclass {type(data).__name__} has no field {', '.join(map(repr, absent))}, where the policy's "
            f"outputs and results go: declare {fields}, or give data.to_tensordict()"
        )


def _fields(data: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(data)]


def _root(key: Any) -> str:
    return key if isinstance(key, str) else key[0]
