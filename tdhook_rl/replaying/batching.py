"""Any batch shape to chunks and back; what an extra pass must leave as it found it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook_rl.internals.tensordict_names import has_names, new_unsafe, set_str, store_of
from tdhook_rl.internals.torch_names import ConvNd, held_parameters
from tdhook_rl.sites.known import may_meet
from tdhook_rl.sites.listed import modules

#: Input elements of one chunk for convolutional nets, where batches that leave the cache are slower on CPU: 64 frames
#: of 3 x 64 x 64, measured best from 32 to 128 for the net of IMPALA. Other nets take the whole batch.
CONV_ELEMENTS = 64 * 3 * 64 * 64
#: Below so many rows a pass of a convolutional net is mostly overhead.
CONV_ROWS = 32

_CONVOLUTIONS = (ConvNd,)


def map_chunks(
    data: TensorDictBase, function: Callable[[TensorDictBase], TensorDictBase], chunk_size: int | None
) -> TensorDictBase:
    """Apply a row-wise function over flat chunks and give the result the batch shape of the data, ``()`` included.

    The function maps a TensorDict with one batch dimension (none if the data has none) to one of the same batch size.
    Without a ``chunk_size`` it is given all rows at once.
    """
    if data.ndim == 0:
        return function(data)
    flat = data.reshape(-1) if data.ndim > 1 else data
    rows = flat.batch_size[0]
    if chunk_size is None or rows <= chunk_size:
        result = function(flat)
    else:
        result = torch.cat([function(flat[start : start + chunk_size]) for start in range(0, rows, chunk_size)])
    return result.reshape(data.batch_size) if data.ndim > 1 else result


def repeat_rows(data: TensorDictBase, copies: int, without: Collection[str] = ()) -> TensorDictBase:
    """The rows of the data several times over, as one batch dimension: all rows, then all rows again.

    Args:
        data: a TensorDict of any batch shape.
        copies: how many times.
        without: entries that are left out.
    """
    dims, rows = data.ndim, data.batch_size.numel()
    repeated = new_unsafe({}, batch_size=torch.Size([copies * rows]), device=data.device)
    # Entry by entry: expand and reshape of a whole TensorDict cost ten times as much.
    for name, value in data.items():
        if name in without:
            continue
        if type(value) is Tensor:
            if dims == 1 and rows == 1:
                more = value.expand(copies, *value.shape[1:])
            else:
                more = value.expand(copies, *value.shape).flatten(0, dims)
            set_str(repeated, name, more, inplace=False, validated=True)
        else:
            shape = value.shape if isinstance(value, Tensor) else value.batch_size
            repeated.set(name, value.expand(copies, *shape).flatten(0, dims))
    return repeated


def conv_chunk(inputs: Iterable[Any], batch: torch.Size) -> int:
    """Rows of one chunk for a convolutional net that reads these inputs.

    Args:
        inputs: what the net reads, tensors with the batch shape first.
        batch: the batch shape.

    Example:
        >>> conv_chunk([torch.zeros(2, 3, 64, 64)], torch.Size([2]))
        64
    """
    rows = max(batch.numel(), 1)
    elements = max((value.numel() // rows for value in inputs if isinstance(value, Tensor)), default=1)
    return max(CONV_ROWS, CONV_ELEMENTS // max(elements, 1))


def in_recurrent_mode(module: nn.Module) -> bool:
    """Whether a TorchRL recurrent module of the policy reads whole trajectories (``set_recurrent_mode``)."""
    return any(getattr(child, "recurrent_mode", False) is True for child in modules(module))


@dataclass(frozen=True)
class Traits:
    """What a policy is made of; its modules are looked through once, not at every call."""

    convolutional: bool
    recurrent: bool  # has a TorchRL recurrent module, which may be told to read whole trajectories
    batch_statistics: bool  # normalises by statistics of its batch when it trains
    cores: tuple[nn.Module, ...] = ()  # these recurrent modules
    weights: int = 0  # how many numbers its parameters are

    @classmethod
    def of(cls, module: nn.Module) -> Traits:
        children = modules(module)
        cores = tuple(child for child in children if hasattr(child, "recurrent_mode"))
        return cls(
            convolutional=any(isinstance(child, _CONVOLUTIONS) for child in children),
            recurrent=bool(cores),
            batch_statistics=any(may_meet(child) for child in children),
            cores=cores,
            weights=sum(one.numel() for one in held_parameters(module).values() if not is_lazy(one)),
        )

    def read_trajectories(self, policy: nn.Module) -> bool:
        """Whether the policy reads whole trajectories just now, as :func:`in_recurrent_mode` finds out slowly."""
        if not self.recurrent:
            return False
        if torch.compiler.is_compiling():  # a trace follows modules by their paths only
            return in_recurrent_mode(policy)
        return any(core.recurrent_mode is True for core in self.cores)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Run batch-statistics layers in eval mode: in a batch that was put together later, the statistics that a row met
    with are not to be had."""
    changed = [
        child for child in modules(module) if child.training and may_meet(child) and child.running_mean is not None
    ]
    for child in changed:
        child.training = False
    try:
        yield
    finally:
        for child in changed:
            child.training = True


def row_vectors(value: Tensor, batch: torch.Size) -> Tensor:
    """The same with one dimension of features after those of the batch; there may be no rows.

    Example:
        >>> row_vectors(torch.zeros(3, 2, 4), torch.Size([3])).shape
        torch.Size([3, 8])
    """
    if value.numel():
        return value.reshape(*batch, -1)
    return value.flatten(len(batch)) if value.ndim > len(batch) else value.unsqueeze(-1)


class GeneratorState:
    """The state of the global generators, to be put back after an extra pass.

    Args:
        device: where the policy runs; the generator of a CUDA device is kept beside that of the CPU.
        others: also those of Python and NumPy.
    """

    def __init__(self, device: torch.device | None = None, others: bool = False) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._states = self._read()
        self._others = (random.getstate(), np.random.get_state()) if others else None

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._cuda is not None:
            states.append(torch.cuda.get_rng_state(self._cuda))
        return states

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return (
            any(not torch.equal(now, then) for now, then in zip(self._read(), self._states, strict=True))
            or self.others_moved()
        )

    def others_moved(self) -> bool:
        """Whether anything was drawn since from the generators of Python or NumPy, if they are kept."""
        return self._others is not None and self._others_differ(random.getstate(), np.random.get_state())

    def _others_differ(self, python: Any, numpy: Any) -> bool:
        then: Any = self._others
        return python != then[0] or numpy[2:] != then[1][2:] or not bool((numpy[1] == then[1][1]).all())

    def restore(self, now: GeneratorState | None = None) -> None:
        """Put the state back; nothing is written where nothing was drawn.

        Args:
            now: what was read just now, of the same generators: to ask NumPy takes as long as a small layer.
        """
        states = self._read() if now is None else now._states
        for index, (one, then) in enumerate(zip(states, self._states, strict=True)):
            if not torch.equal(one, then):
                if index == 0:
                    torch.set_rng_state(then)
                else:
                    torch.cuda.set_rng_state(then, self._cuda)
        moved = self.others_moved() if now is None or now._others is None else self._others_differ(*now._others)
        if self._others is not None and moved:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])


class PassNoise:
    """The noise of several passes in a row, each of which leaves torch's generators as it found them.

    The passes draw from one stream. Between two of them other threads may draw from the generators; putting back a
    state from before the first pass would repeat their noise.
    """

    def __init__(self, device: torch.device | None = None, others: bool = False) -> None:
        self._device, self._others = device, others
        self._own: GeneratorState | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """The duration of one pass."""
        before = GeneratorState(self._device, self._others)
        if self._own is not None:
            self._own.restore()
        try:
            yield
        finally:
            self._own = GeneratorState(self._device, self._others)
            before.restore(self._own)


def _nodes_copied(data: TensorDict) -> TensorDict | None:
    """What ``data.copy()`` gives, in a third of the time; ``None`` of what holds more than tensors and TensorDicts."""
    if has_names(data):
        return None
    entries: dict[str, Any] = {}
    for key, value in store_of(data).items():
        if type(value) is not Tensor:
            value = _nodes_copied(value) if type(value) is TensorDict else None
            if value is None:
                return None
        entries[key] = value
    return new_unsafe(entries, batch_size=data.batch_size, device=data.device)


def shallow_copy(data: TensorDictBase) -> TensorDict:
    """An unlocked TensorDict over the same tensors; results can be added to it without touching the data."""
    if type(data) is TensorDict and not data.is_locked:
        quick = _nodes_copied(data)
        if quick is not None:
            return quick
    copy = data.copy() if not data.is_locked else data.clone(recurse=False)
    return copy.unlock_() if copy.is_locked else copy
