"""The weights of a policy as one number that follows from what they hold, fast enough to be looked at in each call."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.policies.draws import draws
from tdhook_rl.policies.memory import dense_parts, is_dense
from tdhook_rl.policies.mutable_state import find_state
from tdhook_rl.sites.known import all_modules, unknown_modules

#: The tensors of a policy, and where they are held: a mapping and the name in it.
Held = tuple[Mapping[str, Any], str, Tensor]

#: Of a larger tensor of weights the sum is taken, and every so many entries that as many are left.
LARGEST = 1 << 20
#: Up to so many bytes a checksum takes less time than the call of a product.
SHORT = 2048
#: What is longer is added up by rows and columns of a square, which takes a tenth of the time of a product.
SIDE = 1024
#: Of a tensor of up to so many bytes these are kept: to compare them takes a quarter of the time of a product.
KEPT = 1 << 17
_WHOLE = np.dtype(np.int64)


class HeldTensors:
    """The parameters of a policy and of its adapters; and the buffers, but for those of what draws, which do not say
    what it computes.

    Args:
        policy: the policy.
        written: by path, what its forward was seen to write, which says nothing of what it computes either.

    Attributes:
        parameters, buffers, attributes: the tensors, and where they are held; the last in attributes of modules of the
            user's, whatever these hold them in.
    """

    def __init__(self, policy: nn.Module, written: Collection[str] = ()) -> None:
        parameters: dict[int, Held] = {}
        buffers: dict[int, Held] = {}
        mappings: list[Mapping[str, Any]] = []
        self._lists = False  # of tensors in a TensorDict, which are listed anew to be looked at
        for _, child in all_modules(policy):
            mappings += child._modules, child._parameters, child._buffers
            stores = [(child._parameters, parameters)] + ([] if draws(child) else [(child._buffers, buffers)])
            if isinstance(child, TensorDictParams):
                stores = [({str(key): value for key, value in enumerate(child.parameters())}, parameters)]
                self._lists = True
            for store, found in stores:
                found |= {id(value): (store, name, value) for name, value in store.items() if value is not None}
        self.parameters, self.buffers = list(parameters.values()), list(buffers.values())
        known = parameters.keys() | {id(one) for _, child in all_modules(policy) for one in child._buffers.values()}
        self.attributes: list[Held] = [
            ({path: tensor}, path, tensor)
            for tensor, path, _ in find_state(unknown_modules(policy)).tensors
            if id(tensor) not in known and path not in written and tensor.grad_fn is None
        ]
        self._full = [(mapping, tuple(mapping.values())) for mapping in mappings if mapping]
        self._empty = [mapping for mapping in mappings if not mapping]
        #: By tensor where it is, how long, and its bytes in memory.
        self._views: dict[int, tuple[int, int, np.ndarray]] = {}
        #: The last number, the tensors that it is of, and of each, if all were kept, how to ask where it is, how long
        #: and what its bytes are, with the answers.
        self._number, self._of = 0, list[Held]()
        self._kept: list[tuple[Callable[[], Any], int, Callable[[], Any], int, Callable[[], bytes], bytes]] = []

    def are_in_place(self) -> bool:
        """Whether the policy surely has the modules that it had, and these hold what they held."""
        if self._lists or any(self._empty):
            return False
        for mapping, known in self._full:
            if len(mapping) != len(known) or not all(map(operator.is_, mapping.values(), known)):
                return False
        return True

    def number(self, held: Sequence[Held]) -> int:
        """A number that follows from the content of tensors, the same in every process and on every device."""
        if self.are_kept(held):
            return self._number
        self._kept = []
        found = 0
        for _, _, tensor in held:
            if not tensor.is_meta:  # which has no content
                found = zlib.crc32(self._digest(tensor), found)
        self._number, self._of = found, list(held)
        return found

    def are_kept(self, held: Sequence[Held]) -> bool:
        """Whether these are the tensors that the last number is of, and surely hold what they held."""
        if not held or len(held) != len(self._kept) or any(map(operator.is_not, held, self._of)):
            return False
        for place, then, size, length, read, content in self._kept:  # in each call and for each: calls would cost most
            if place() != then or size() != length or read() != content:
                return False
        return True

    def _digest(self, tensor: Tensor) -> bytes:
        if not is_dense(tensor):
            parts = (part.detach().reshape(-1).contiguous().cpu() for part in dense_parts(tensor))
            return b"".join(digest_of(_bytes(part)) for part in parts)
        view = self._view(tensor)
        if view is None:
            flat = tensor.detach().reshape(-1)
            total = b""
            if flat.numel() > LARGEST:
                total = np.float64(flat.sum(dtype=torch.float64).item()).tobytes()
                flat = flat[:: flat.numel() // LARGEST + 1]
            return total + digest_of(_bytes(flat.contiguous().cpu()))
        if view.nbytes > KEPT:
            return digest_of(view)
        content = view.tobytes()
        self._kept.append((tensor.data_ptr, tensor.data_ptr(), tensor.numel, tensor.numel(), view.tobytes, content))
        return digest_of(np.frombuffer(content, view.dtype))  # of what is kept: another process may write meanwhile

    def _view(self, tensor: Tensor) -> np.ndarray | None:
        """The bytes of a tensor in memory, where they are all looked at, without a copy."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() > LARGEST:
            return None
        place, length, view = self._views.get(id(tensor), (0, 0, None))
        if view is None or place != tensor.data_ptr() or length != tensor.nbytes:
            view = _bytes(tensor.detach().reshape(-1))
            self._views[id(tensor)] = tensor.data_ptr(), tensor.nbytes, view
        return view


def versions(held: Sequence[Held]) -> int | None:
    """How often tensors were written to; -1 where inference mode does not count it, ``None`` if others are in place."""
    found = 0
    try:
        for store, name, tensor in held:
            if store.get(name) is not tensor:
                return None
            found += tensor._version
    except RuntimeError:
        return -1
    return found


def _bytes(flat: Tensor) -> np.ndarray:
    """A contiguous tensor of one dimension as whole numbers, or as bytes where these do not come out even."""
    found = flat.view(torch.uint8).numpy()
    return found.view(_WHOLE) if found.nbytes % _WHOLE.itemsize == 0 else found


#: Odd numbers, always the same, by each of which no change of an entry becomes none; and even ones, which keep that.
_ODD = 2 * np.random.Generator(np.random.PCG64(0)).integers(-(1 << 62), 1 << 62, 8 * SIDE, dtype=np.int64) + 1
_EVEN = _ODD - 1


def digest_of(view: np.ndarray) -> bytes:
    """What follows from all that is in memory; a change of one entry always changes it."""
    if view.nbytes <= SHORT or view.dtype != _WHOLE or len(view) > SIDE * SIDE:
        return zlib.crc32(view).to_bytes(4, "little")
    if len(view) <= len(_ODD):
        return view.dot(_ODD[: len(view)]).tobytes()
    rows = len(view) // SIDE
    square, rest = view[: rows * SIDE].reshape(rows, SIDE), view[rows * SIDE :]
    parts = (square.sum(0), _ODD[:SIDE]), (square.sum(1), _EVEN[SIDE:]), (rest, _ODD[2 * SIDE :])
    total = sum(int(np.dot(entries, factors[: len(entries)])) for entries, factors in parts)
    return (total % (1 << 64)).to_bytes(8, "little")
