"""Tensors written into TensorDicts without the detour through conversions.

``TensorDictModule`` passes each output through ``TensorDict.from_any``, which looks for optional packages at
every call: about 30 us, more than everything else that a hooked policy adds. A tensor needs no conversion.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_non_tensor
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.errors import KeyCollisionError
from tdhook_rl.internals.tensordict_names import has_names, new_unsafe, set_str, store_of, written_by
from tdhook_rl.policies.undecorated import is_decorated, undecorated
from tdhook_rl.sites.classes import Swapped


def write_tensors(
    self: TensorDictModule,
    tensordict: TensorDictBase,
    tensors: Sequence[Tensor],
    tensordict_out: TensorDictBase | None = None,
    out_keys: Sequence[NestedKey] | None = None,
) -> TensorDictBase:
    """In the place of ``TensorDictModule._write_to_tensordict``; what is no plain tensor goes the usual way."""
    keys = self.out_keys_source if out_keys is None else out_keys
    target = tensordict if tensordict_out is None and self.inplace is True else tensordict_out
    if target is None or len(keys) != len(tensors) or any(type(tensor) is not Tensor for tensor in tensors):
        return TensorDictModule._write_to_tensordict(self, tensordict, tensors, tensordict_out, out_keys)
    for key, tensor in zip(keys, tensors, strict=True):
        if key != "_":
            set_tensor(target, key, tensor)
    return target


class WritingMixin(Swapped):
    """A module below the root of a hooked policy, with :func:`write_tensors` and without idle decorators."""

    _write_to_tensordict = write_tensors

    @classmethod
    def _namespace(cls, base: type[nn.Module]) -> dict[str, Any]:
        decorated = base.forward
        if not is_decorated(decorated):
            return {}

        @functools.wraps(decorated)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return undecorated(decorated, args)(self, *args, **kwargs)

        return {"forward": forward}


def writes_by_default(cls: type[nn.Module]) -> bool:
    """Whether modules of a class write the way ``TensorDictModule`` does, with no way of their own."""
    return written_by(cls) is written_by(TensorDictModule)


def set_tensor(data: TensorDictBase, key: NestedKey, value: Tensor) -> None:
    """Set an entry; one at the top whose shape and device are right without TensorDict's conversions and checks."""
    if (
        type(key) is str
        and type(data) is TensorDict
        and type(value) is Tensor
        and value.shape[: data.ndim] == data.batch_size
        and (data.device is None or data.device == value.device)
    ):
        set_str(data, key, value, inplace=False, validated=True)
    else:
        data.set(key, value)


def tensors_as_entries(entries: Mapping[NestedKey, Tensor], batch: torch.Size) -> TensorDict:
    """A TensorDict of tensors; where all are at the top and of its batch size, without its conversions and checks."""
    dims = len(batch)
    for key, value in entries.items():
        if type(key) is not str or type(value) is not Tensor or value.shape[:dims] != batch:
            break
    else:
        return new_unsafe(dict(entries), batch_size=batch)
    data = new_unsafe({}, batch_size=batch)
    for key, value in entries.items():
        set_tensor(data, key, value)
    return data


def set_entries(data: TensorDictBase, entries: Mapping[tuple[str, ...], Tensor]) -> None:
    """Set entries; where their shape and device are right, without TensorDict's conversions and checks.

    Entry by entry where a root is there already: setting a nested TensorDict at once costs several times as much. A new
    root is made with all that belongs to it.
    """
    if type(data) is not TensorDict:
        for key, value in entries.items():
            data.set(key, value)
        return
    batch, device = data.batch_size, data.device
    dims = len(batch)
    new: dict[str, dict[str, Tensor]] = {}
    others: list[tuple[tuple[str, ...], Tensor]] = []
    for key, value in entries.items():
        if type(value) is Tensor and value.shape[:dims] == batch and (device is None or device == value.device):
            if len(key) == 1:
                set_str(data, key[0], value, inplace=False, validated=True)
                continue
            if len(key) == 2:
                root = key[0]
                if root in new:
                    new[root][key[1]] = value
                    continue
                node = store_of(data).get(root)
                if node is None:
                    new[root] = {key[1]: value}
                    continue
                if type(node) is TensorDict and node.device is None and not node.is_locked:
                    set_str(node, key[1], value, inplace=False, validated=True)
                    continue
        if len(key) > 1:
            _may_hold(data, key[0])  # raises before any part of a root is written
        others.append((key, value))
    if new:
        names = data.names if has_names(data) else None
        for root, held in new.items():
            set_str(data, root, _new_node(held, batch, names), inplace=False, validated=True)
    for key, value in others:
        _set_entry(data, key, value)


def _set_entry(data: TensorDict, key: tuple[str, ...], value: Tensor) -> None:
    if len(key) > 1 and _may_hold(data, key[0]):
        node = _node(data, key[0])
        fits = value.shape[: data.ndim] == data.batch_size and data.device in (None, value.device)
        if type(value) is Tensor and fits:
            node.set(key[1:], value)
            return
    data.set(key, value)


def _may_hold(data: TensorDict, root: str) -> bool:
    """Whether a root is free or a TensorDict's; what else the user has there is not written over.

    Raises:
        KeyCollisionError: if it holds no entries at all.
    """
    found = store_of(data).get(root)
    if found is None or type(found) is TensorDict:
        return True
    require_room(found, root)
    return isinstance(found, TensorDictBase)


def require_room(found: Any, root: str) -> None:
    """Raise :class:`KeyCollisionError` if what the data has under a root holds no entries."""
    if isinstance(found, Tensor) or is_non_tensor(found):
        raise KeyCollisionError(
            f"results are written under {root!r}, where the data has a {type(found).__name__} of its own: give the "
            "method another root (attribution_key=, cache_key=, probe_key=)"
        )


def _node(data: TensorDict, root: str) -> TensorDictBase:
    """The node of a root, one without a device (see :func:`_new_node`)."""
    node = store_of(data).get(root)
    if isinstance(node, TensorDictBase):
        if node.device is None and not node.is_locked:
            return node
        node = node.copy().clear_device_()
    else:
        node = _new_node({}, data.batch_size, data.names if has_names(data) else None)
    set_str(data, root, node, inplace=False, validated=True)
    return node


def _new_node(held: dict[str, Tensor], batch: torch.Size, names: Sequence[str] | None) -> TensorDict:
    """A node for entries of the batch size, without a device.

    A collector with ``device=`` looks for the policy's outputs by comparing, among others, the mask
    ``("computed", "cache")`` with the node ``"cache"``, and raises where both have the same device; one that casts
    and writes to a buffer cannot stack nodes of which only some have a device.
    """
    return new_unsafe(held, batch_size=batch, names=names)
