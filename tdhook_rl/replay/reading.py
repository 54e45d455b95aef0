"""A replay buffer in storage order, whatever it stores: transitions, trajectories, or several dimensions of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import ReplayBufferEnsemble

from tdhook_rl.errors import InputError

__all__ = ["entries", "in_order", "read"]


def in_order(buffer: ReplayBuffer, batch_size: int = 1024, start: int = 0) -> Iterator[tuple[int, TensorDictBase]]:
    """Batches of a buffer in storage order, as ``buffer.sample`` would give these rows (collated and transformed).

    Args:
        buffer: any TorchRL buffer of TensorDicts; it is only read.
        batch_size: rows read at once. Where an entry of the storage is a trajectory, or the storage has several
            dimensions, as many whole entries as have so many rows, and at least one.
        start: the entry to begin with.

    Yields:
        the index of the first entry of a batch, and the batch, entries first; the last may be smaller.

    Raises:
        InputError: if the buffer is empty, an ensemble, or does not hold TensorDicts.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(10))
        >>> _ = buffer.extend(TensorDict({"observation": torch.randn(10, 3)}, batch_size=10))
        >>> [(first, len(batch)) for first, batch in in_order(buffer, 4)]
        [(0, 4), (4, 4), (8, 2)]
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size= is a positive integer, got {batch_size!r}")
    size, rows = entries(buffer)
    step = max(1, batch_size // rows)
    for first in range(start, size, step):
        yield first, read(buffer, torch.arange(first, min(first + step, size)))


def entries(buffer: ReplayBuffer) -> tuple[int, int]:
    """How many entries a buffer has along the first dimension of its storage, and how many rows are in each.

    Raises:
        InputError: as of :func:`in_order`.
    """
    if isinstance(buffer, ReplayBufferEnsemble):
        raise InputError("an ensemble of buffers has no storage order: analyse each of its buffers, ensemble[i]")
    size = len(buffer)
    if size == 0:
        raise InputError("the replay buffer is empty")
    rows = max(1, read(buffer, torch.arange(1)).batch_size[1:].numel())
    # A storage of several dimensions counts all its elements, one of trajectories counts these.
    return (size // rows if buffer.storage.ndim > 1 else size), rows


def read(buffer: ReplayBuffer, index: torch.Tensor) -> TensorDictBase:
    """Some entries of a buffer.

    Raises:
        InputError: if they are not TensorDicts.
    """
    found: Any = buffer[index]
    if not is_tensor_collection(found):
        raise InputError(
            f"the buffer holds a {type(found).__name__} where a TensorDict is analysed: store TensorDicts, or give the "
            "buffer a collate_fn that makes them"
        )
    return found
