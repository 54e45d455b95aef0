"""A replay buffer, offline: read it in storage order, keep the results beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer

from tdhook_rl.errors import ArtifactError, InputError

__all__ = ["analyze", "in_order"]


def in_order(buffer: ReplayBuffer, batch_size: int = 1024) -> Iterator[tuple[int, TensorDictBase]]:
    """Batches of a buffer in storage order, each with the index of its first row; the last may be smaller.

    Raises:
        InputError: if the buffer is empty.
    """
    size = len(buffer)
    if size == 0:
        raise InputError("the replay buffer is empty")
    for start in range(0, size, batch_size):
        yield start, buffer.storage.get(torch.arange(start, min(start + batch_size, size)))


def analyze(hooked: Any, buffer: ReplayBuffer, folder: str | Path, *, batch_size: int = 1024) -> TensorDict:
    """Annotate every row of a buffer and keep the results in memory-mapped files beside it.

    Args:
        hooked: a hooked policy; its configured methods are computed.
        buffer: any TorchRL buffer; it is only read.
        folder: where the results go; a new or empty folder.
        batch_size: rows read at once.

    Returns:
        a memory-mapped TensorDict of the result keys, row ``i`` for storage row ``i``; read it again with
        ``TensorDict.load_memmap(folder)``.

    Raises:
        ArtifactError: if the folder is not empty or cannot be written.
        InputError: if the buffer is empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is not empty: results of another run are not overwritten; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    results: TensorDict | None = None
    for start, batch in in_order(buffer, batch_size):
        found = hooked.annotate(batch).select(*hooked.result_keys)
        if results is None:
            results = found[0].expand(len(buffer)).memmap_like(folder)
        results[start : start + len(found)] = found
    return results
