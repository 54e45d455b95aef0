"""Folders that hold rows: what ``ReplayBuffer.dumps`` has written, and memory-mapped TensorDicts; nothing is unpickled.

Their files are mapped, not read: a folder may be larger than memory. A file that is missing or cut is found before it
is mapped, since the mapping would fill it up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter, RoundRobinWriter, TensorDictMaxValueWriter

from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.files.durable import read_json
from tdhook_rl.internals.tensordict_names import file_stem
from tdhook_rl.internals.torchrl_names import cursor_of, set_written

#: What the folder of an analysis has, which holds no rows.
MANIFEST = "analysis.json"
_STORAGE, _TENSORDICT = "storage_metadata.json", "meta.json"
#: What is in a folder that cannot be mapped, and what to do with it.
_OTHERS = {
    "compressed_data": "a compressed storage",
    "checkpoint.h5": "a storage in HDF5",
    "data_indices.json": "a compressed storage",
}
_LOAD = "make the buffer, loads() the folder, and analyse the buffer"


class LinesWriter(ImmutableDatasetWriter):
    """Of a storage of several dimensions that was saved: how many steps were written to its lines, and where next."""

    def __init__(self, steps: int, place: int) -> None:
        super().__init__()
        self.steps, self.place = steps, place


def lines_of(buffer: ReplayBuffer) -> tuple[int, int]:
    """How many steps were written to the lines of a storage of several dimensions, and where next; 0 where none tells.

    Example:
        >>> lines_of(ReplayBuffer(writer=LinesWriter(7, 3))), lines_of(ReplayBuffer(writer=ImmutableDatasetWriter()))
        ((7, 3), (0, 0))
    """
    writer = buffer.writer
    if isinstance(writer, LinesWriter):
        return writer.steps, writer.place
    return (buffer.write_count, cursor_of(writer)) if isinstance(writer, RoundRobinWriter) else (0, 0)


def open_folder(path: Path) -> ReplayBuffer:
    """A buffer of what a folder holds, as it is stored: without the transforms that it had.

    Raises:
        ArtifactError: if it is none, cannot be mapped, holds something that is pickled, or lacks a part of a file.
        InputError: if the buffer is empty.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise ArtifactError(f"{path} {what}: name the folder that buffer.dumps(), or memmap() of a TensorDict, wrote")
    if (path / MANIFEST).exists():
        raise ArtifactError(f"{path} holds the results of an analysis, not the rows of a buffer: name the buffer's")
    if (path / "storage").is_dir():
        if (path / "transform.t").exists():
            warn(
                f"the buffer in {path} had transforms, which a folder does not hold: its rows are analysed as they are "
                f"stored. Where samples are meant, {_LOAD}"
            )
        return _open_storage(path / "storage", path / "writer")
    if (path / _STORAGE).exists():
        return _open_storage(path, path.parent / "writer")
    if (path / _TENSORDICT).exists():
        return ReplayBuffer(storage=TensorStorage(_mapped(path)), writer=ImmutableDatasetWriter())
    raise ArtifactError(
        f"{path} holds neither a buffer ({_STORAGE}), nor a TensorDict ({_TENSORDICT}), nor Parquet files: name the "
        "folder that buffer.dumps(), or memmap() of a TensorDict, wrote"
    )


def _open_storage(folder: Path, writer: Path) -> ReplayBuffer:
    for name, what in _OTHERS.items():
        if (folder / name).exists():
            raise ArtifactError(f"{folder} holds {what}, which cannot be mapped: {_LOAD}")
    if not (folder / _STORAGE).exists() and (folder / "0").is_dir():
        raise ArtifactError(f"{folder} holds an ensemble of buffers: name one of them, such as {folder / '0'}")
    facts = read_json(folder / _STORAGE, "what dumps() writes of a storage")
    length = facts.get("len") if isinstance(facts, dict) else None
    if not isinstance(length, int) or length < 0:
        raise ArtifactError(f"{folder / _STORAGE} says that the storage has {length!r} rows")
    if facts.get("is_pytree"):
        raise InputError(f"the buffer in {folder} holds no TensorDicts, which are what is analysed")
    if length == 0:
        raise InputError(f"the replay buffer in {folder} is empty")
    data = _mapped(folder)
    if "is_full" in data.keys() and "shift" in data.keys():
        raise ArtifactError(f"{folder} holds a storage that was compressed by a checkpointer of its own: {_LOAD}")
    order = read_json(writer / "metadata.json", "what dumps() writes of a writer") if writer.is_dir() else {}
    count, cursor = (order.get(name) for name in ("write_count", "cursor")) if isinstance(order, dict) else (None, None)
    if not all(one is None or (isinstance(one, int) and one >= 0) for one in (count, cursor)):
        raise ArtifactError(f"{writer / 'metadata.json'} says that {count!r} rows were written, the next at {cursor!r}")
    # A storage of several dimensions counts all its elements, and its writer what it has along the first.
    rows, capacity = data.batch_size[1:].numel(), len(data)
    entries = length if count is None else min(count, capacity)
    several = data.ndim > 1 and length > capacity if count is None else length == entries * rows and rows > 1
    entries = length // rows if several else length
    if entries > capacity:
        raise ArtifactError(f"{folder / _STORAGE} counts {length} rows, and the files hold {capacity}")
    if several:  # time comes first in several dimensions, and last in what samples are
        found = data[:entries].transpose(0, data.ndim - 1)
        return ReplayBuffer(storage=TensorStorage(found), writer=LinesWriter(count or 0, cursor or 0))
    return _written(TensorStorage(data[:entries]), order, cursor or 0, count)


def _written(storage: TensorStorage, order: Mapping[str, Any], cursor: int, count: int | None) -> ReplayBuffer:
    """A buffer of a storage, with the order in which it was written."""
    if count is None:
        return ReplayBuffer(storage=storage, writer=ImmutableDatasetWriter())
    if "rank_key" in order:
        return ReplayBuffer(storage=storage, writer=TensorDictMaxValueWriter(rank_key=str(order["rank_key"])))
    buffer = ReplayBuffer(storage=storage, writer=RoundRobinWriter())
    set_written(buffer.writer, count, cursor)
    return buffer


def _mapped(folder: Path) -> TensorDict:
    _require_whole(folder)
    try:
        data = TensorDict.load_memmap(folder, allow_pickle=False)
    except RuntimeError as error:
        if "pickle" in str(error):
            raise ArtifactError(
                f"{folder} holds entries that are pickled, and unpickling runs what a file says: if you trust it, "
                f"{_LOAD}"
            ) from error
        raise ArtifactError(f"cannot map {folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"cannot map {folder}: {error}") from error
    if not is_tensor_collection(data) or data.ndim == 0:
        raise ArtifactError(f"{folder} holds a TensorDict without a batch dimension: there are no rows in it")
    return data


def _require_whole(folder: Path) -> None:
    """Raise :class:`ArtifactError` if a file that ``meta.json`` names is missing or has another size."""
    facts = read_json(folder / _TENSORDICT, "what memmap() writes of a TensorDict")
    if not isinstance(facts, dict):
        raise ArtifactError(f"{folder / _TENSORDICT} is not what memmap() writes of a TensorDict")
    for key, entry in facts.items():
        if not isinstance(entry, dict):
            continue
        if "type" in entry:
            inner = next((one for one in (folder / file_stem(key), folder / key) if one.is_dir()), None)
            if inner is None:
                raise ArtifactError(f"{folder} lacks the folder of {key!r}, which {_TENSORDICT} names")
            if (inner / _TENSORDICT).exists():
                _require_whole(inner)
            continue
        shape, name = entry.get("shape"), str(entry.get("dtype")).removeprefix("torch.")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not _is_shape(shape):
            raise ArtifactError(f"{folder / _TENSORDICT} says that {key!r} is {shape!r} of {name!r:.40}")
        if entry.get("is_nested"):
            raise ArtifactError(f"{key!r} in {folder} is ragged, and rows of one shape are analysed: {_LOAD}")
        size = torch.Size(shape).numel() * dtype.itemsize
        paths = [folder / f"{stem}.memmap" for stem in (file_stem(key), key)]
        found = next((one.stat().st_size for one in paths if one.is_file()), 0)
        if found < size:
            raise ArtifactError(f"{paths[0]} has {found} bytes, and {key!r} of shape {tuple(shape)} has {size}")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(one) is int and 0 <= one < 1 << 40 for one in shape)
