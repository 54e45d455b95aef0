"""Tensors written into TensorDicts without the detour through conversions.

``TensorDictModule`` passes each output through ``TensorDict.from_any``, which looks for optional packages at
every call: about 30 us, more than everything else that a hooked policy adds. A tensor needs no conversion.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.classes import Swapped

__all__ = ["WritingMixin", "set_entry", "write_tensors", "writes_by_default"]


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
            target.set(key, tensor)
    return target


class WritingMixin(Swapped):
    """A module below the root of a hooked policy, with :func:`write_tensors`."""

    _write_to_tensordict = write_tensors


def writes_by_default(cls: type[nn.Module]) -> bool:
    """Whether modules of a class write the way ``TensorDictModule`` does, with no way of their own."""
    return getattr(cls, "_write_to_tensordict", None) is TensorDictModule._write_to_tensordict


def set_entry(data: TensorDictBase, key: tuple[str, ...], value: Tensor) -> None:
    """Set an entry; where its shape and device are right, without TensorDict's conversions and checks."""
    batch = data.batch_size
    if type(data) is TensorDict and len(key) > 1:
        _drop_device_of_node(data, key[0])
    if (
        type(data) is TensorDict
        and type(value) is Tensor
        and value.shape[: len(batch)] == batch
        and (data.device is None or data.device == value.device)
    ):
        data._set_tuple(key, value, inplace=False, validated=True)
    else:
        data.set(key, value)


def _drop_device_of_node(data: TensorDict, root: str) -> None:
    """Let the node of a root be one without a device.

    A collector with ``device=`` looks for the policy's outputs by comparing, among others, the mask
    ``("computed", "cache")`` with the node ``"cache"``, and raises where both have the same device; one that casts
    and writes to a buffer cannot stack nodes of which only some have a device.
    """
    node = data._get_str(root, None)
    if node is None:
        if data.device is not None:
            data._set_str(root, TensorDict({}, batch_size=data.batch_size), inplace=False, validated=True)
    elif isinstance(node, TensorDictBase) and node.device is not None:
        data._set_str(root, node.copy().clear_device_(), inplace=False, validated=True)
