"""What rows come from, in the shape that a reader needs: buffers, folders, files, TensorDicts, iterables of those."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.data.replay_buffers import ReplayBufferEnsemble
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter, RoundRobinWriter

from tdhook_rl.errors import InputError
from tdhook_rl.internals.torchrl_names import collate_fn, cursor_of, read_lock, time_first
from tdhook_rl.reading.folders import LinesWriter, lines_of, open_folder
from tdhook_rl.reading.minari_episodes import episodes_of, is_minari, require_loaded
from tdhook_rl.reading.order import Written
from tdhook_rl.reading.parquet_rows import ParquetRows, holds_parquet
from tdhook_rl.reading.transforms import applied_transforms, rows_are_known

#: What :func:`tdhook_rl.replay.analyze` reads.
KINDS = (
    "a ReplayBuffer, the folder of one (buffer.dumps) or of a memory-mapped TensorDict, Parquet files, a TensorDict, a "
    "Minari dataset, a list of TensorDicts, or a function that gives an iterator over TensorDicts"
)


#: The same for a signature.
Rows = (
    ReplayBuffer | Storage | TensorDictBase | str | Path | Iterable[Any] | Callable[[], Any]
)  # fmt: skip


class Source(Protocol):
    """Entries by their number, as they are before transforms.

    Attributes:
        entries: how many there are.
        rows: how many rows each has; one, or those of a trajectory.
        transforms: what is applied to them when they are read.
        known: whether what is applied is known to give a row the same values whichever are read with it.
        turn: as of :class:`Written`.
    """

    entries: int
    rows: int
    transforms: list[nn.Module]
    known: bool
    turn: int

    def raw(self, index: Tensor) -> Any:
        """These entries, stacked."""

    def writes(self) -> int | None:
        """How often it was written to; ``None`` where nobody counts."""

    def written(self, looking: str) -> Written:
        """In which order its entries came; ``looking`` is what needs it, for messages."""


def source_of(given: Any) -> Source:
    """The source that an argument names.

    Raises:
        InputError: if it is empty, none of :data:`KINDS`, or cannot be read twice.
        ArtifactError: for a folder, as of :func:`open_folder`; for Parquet, as of :class:`ParquetRows`.
    """
    if isinstance(given, ReplayBufferEnsemble):
        raise InputError("an ensemble of buffers has no storage order: analyse each of its buffers, ensemble[i]")
    if isinstance(given, ReplayBuffer):
        require_loaded(given)
        return _Buffer(given)
    if isinstance(given, str | Path):
        path = Path(given)
        return ParquetRows(path) if holds_parquet(path) else _Buffer(open_folder(path))
    if isinstance(given, Storage):
        return _Buffer(ReplayBuffer(storage=given, writer=ImmutableDatasetWriter()))
    if is_tensor_collection(given):
        if is_ragged(given):
            pieces = _lines(given)
            return _Pieces(pieces.__iter__, pieces)
        if given.ndim == 0 or not len(given):
            raise InputError(f"the TensorDict of batch size {tuple(given.batch_size)} has no rows")
        return _Buffer(ReplayBuffer(storage=TensorStorage(given), writer=ImmutableDatasetWriter()))
    if isinstance(given, BaseCollector):
        raise InputError(
            "a collector gives other rows each time it is asked, and an analysis may go on: put what it gives into a "
            "buffer, or a list"
        )
    if is_minari(given):
        return _Pieces(lambda: episodes_of(given), None)
    if isinstance(given, Iterator):
        raise InputError(
            f"{type(given).__name__} can be gone through once only, and an analysis counts, reads, and may go on: give "
            "the function that makes it, without calling it"
        )
    if isinstance(given, Sequence):
        return _Pieces(given.__iter__, given)
    if isinstance(given, Iterable) and not isinstance(given, Tensor):
        return _Pieces(given.__iter__, None)
    if callable(given) and not issubclass(given if isinstance(given, type) else type(given), nn.Module):
        return _Pieces(given, None)
    raise InputError(f"what is analysed is {KINDS}; got {given!r:.80} ({type(given).__name__})")


class _Buffer:
    """A replay buffer in storage order."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self._buffer = buffer
        # Buffers in other processes are asked as they are.
        self._near = type(buffer).__getitem__ is ReplayBuffer.__getitem__
        length = len(buffer)
        if length == 0:
            raise InputError("the replay buffer is empty")
        self.transforms = applied_transforms(buffer.transform) if self._near else []
        self.known = self._near and rows_are_known(buffer, self.transforms)
        first = self.raw(torch.arange(1))
        if not is_tensor_collection(first):
            raise InputError(
                f"the buffer holds a {type(first).__name__} where a TensorDict is analysed: store TensorDicts, or give "
                "the buffer a collate_fn that makes them"
            )
        self.rows = max(1, first.batch_size[1:].numel())
        # A storage of several dimensions counts all its elements, one of trajectories counts these.
        several = self._near and buffer.storage.ndim > 1
        self.entries = buffer.storage.shape[buffer.dim_extend] if several else length
        if several and length != self.entries * self.rows:
            raise InputError(
                f"the storage of the buffer has the shape {tuple(buffer.storage.shape)}, and counts {length} rows, so "
                "it gives only some of them: TorchRL counts so where a TensorStorage of several dimensions is made of "
                "a TensorDict. Analyse that TensorDict"
            )
        # Where it grows along time, that goes round, for all lines alike.
        self._lines, self.turn, self._over = several and buffer.dim_extend > 0, 0, False
        if self._near and (self._lines or isinstance(buffer.writer, LinesWriter)):
            count, cursor = lines_of(buffer)
            self._over = count > first.batch_size[-1]
            self.turn = cursor % first.batch_size[-1] if self._over else 0

    def raw(self, index: Tensor) -> Any:
        buffer = self._buffer
        if not self._near:
            return buffer[index]
        where: Any = index.numpy()
        with read_lock(buffer):
            if buffer.dim_extend > 0:
                found = time_first(buffer, buffer.storage[(slice(None),) * buffer.dim_extend + (where,)])
            else:
                found = buffer.storage[where]
        found = collate_fn(buffer)(found)
        # A stack of what is stored: a transform would write into it.
        return found.clone() if isinstance(found, LazyStackedTensorDict) and self.transforms else found

    def writes(self) -> int | None:
        # Offline datasets have a writer that counts nothing, since it writes nothing.
        return getattr(self._buffer, "write_count", None)

    def written(self, looking: str) -> Written:
        if self.rows > 1 and not self._near:
            return Written()
        writer, written = self._buffer.writer, self.writes()
        number_key = getattr(self._buffer.sampler, "traj_key", None)
        ordered = isinstance(writer, RoundRobinWriter | ImmutableDatasetWriter)
        if self.rows > 1 and (ordered or not self._lines):
            went_round = isinstance(writer, RoundRobinWriter) and not self._lines and (written or 0) > self.entries
            cursor = cursor_of(writer) % self.entries if went_round else 0
            return Written(cursor=cursor, over=self._over, number_key=number_key, turn=self.turn)
        if not ordered:
            raise InputError(
                f"{looking} reads rows of one trajectory, and the {type(writer).__name__} of the buffer does "
                "not keep them in the order in which they came"
            )
        full = self.entries == getattr(self._buffer.storage, "max_size", self.entries)
        ring = full and isinstance(writer, RoundRobinWriter)
        return Written(
            cursor=cursor_of(writer) % self.entries if full else 0,
            over=ring and (written is None or written > self.entries),
            number_key=number_key,
        )


class _Pieces:
    """TensorDicts one after the other, each a trajectory or a batch: an entry for each of their rows.

    Args:
        again: gives an iterator over all of them, each time it is called.
        listed: the same by number, where they are in memory.
    """

    rows, known, turn = 1, True, 0

    def __init__(self, again: Callable[[], Any], listed: Sequence[Any] | None) -> None:
        self.transforms: list[nn.Module] = []
        self._again, self._listed = again, listed
        self._iterator: Iterator[Any] | None = None
        self._current: tuple[int, TensorDictBase] | None = None
        self._sums: list[int] = []
        sizes, begins, keys = [], [], None
        for number, piece in enumerate(self._pieces()):
            if not is_tensor_collection(piece) or piece.ndim == 0:
                what = "one without a batch dimension" if is_tensor_collection(piece) else f"{piece!r:.60}"
                raise InputError(f"an iterable of TensorDicts is analysed, each with rows; number {number} is {what}")
            flat = _flat(piece)
            keys = keys or _described(flat)
            if _described(flat) != keys:
                odd = sorted(map(str, keys ^ _described(flat)))
                raise InputError(f"the TensorDicts of an iterable are alike; number {number} differs in {odd[0]}")
            sizes.append(len(flat))
            # Each is a trajectory, or a batch of them with time last, where nothing in it says more.
            begins.append((torch.arange(len(flat)) % piece.batch_size[-1] == 0) if len(flat) else torch.zeros(0) > 0)
            if listed is None:
                self._sums.append(_checksum(flat))
        self._stops = torch.tensor(sizes).cumsum(0) if sizes else torch.zeros(0, dtype=torch.long)
        self.entries = int(sum(sizes))
        if not self.entries:
            raise InputError(f"the iterable gives no rows ({len(sizes)} TensorDicts): there is nothing to analyse")
        self._begins = torch.cat(begins)

    def raw(self, index: Tensor) -> TensorDictBase:
        numbers = torch.searchsorted(self._stops, index, right=True)
        parts, places = [], []
        for number in numbers.unique().tolist():
            here = (numbers == number).nonzero().flatten()
            start = int(self._stops[number - 1]) if number else 0
            parts.append(self._piece(number)[index[here] - start])
            places.append(here)
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found if len(parts) == 1 else found[torch.cat(places).argsort()]

    def writes(self) -> int | None:
        return None

    def written(self, looking: str) -> Written:
        return Written(begins=self._begins)

    def _pieces(self) -> Iterator[Any]:
        found = self._again()
        if not isinstance(found, Iterable) or isinstance(found, Tensor | TensorDictBase):
            raise InputError(f"a function that is analysed gives an iterator over TensorDicts, got {found!r:.60}")
        return iter(found)

    def _piece(self, wanted: int) -> TensorDictBase:
        if self._listed is not None:
            return _flat(self._listed[wanted])
        if self._current is None or self._current[0] > wanted:
            self._iterator, self._current = self._pieces(), None
        number = -1 if self._current is None else self._current[0]
        while number < wanted:
            number += 1
            piece = next(self._iterator, None)  # type: ignore[arg-type]
            flat = None if piece is None else _flat(piece)
            # A source that draws its rows anew would give results that belong to none.
            if flat is None or (number == wanted and _checksum(flat) != self._sums[number]):
                raise InputError(
                    f"the iterable gave other rows the second time (number {number} of {len(self._sums)}), so results "
                    "would not belong to them: give a function whose every iterator gives the same"
                )
            self._current = (number, flat)
        assert self._current is not None
        return self._current[1]


def is_ragged(data: TensorDictBase) -> bool:
    """Whether it is a lazy stack of trajectories of different lengths."""
    return -1 in data.batch_size


def _lines(data: TensorDictBase) -> list[TensorDictBase]:
    """The trajectories of a lazy stack, whose lengths differ."""
    if not is_ragged(data):
        return [data]
    if data.batch_size[0] == -1:
        raise InputError(
            f"a TensorDict of batch size {tuple(data.batch_size)} has trajectories of other lengths along its first "
            "dimension: time is the last one, torch.stack(trajectories, 0); or give them as a list"
        )
    return [line for one in data.unbind(0) for line in _lines(one)]


def _flat(piece: TensorDictBase) -> TensorDictBase:
    return piece if piece.ndim == 1 else piece.flatten(0, -1)


def _described(flat: TensorDictBase) -> set[Any]:
    found = flat.items(True, True)
    return {(key, tuple(one.shape[1:]), one.dtype) if isinstance(one, Tensor) else key for key, one in found}


def _checksum(flat: TensorDictBase) -> int:
    found = len(flat)
    for _, value in sorted(flat.items(True, True), key=lambda pair: str(pair[0])):
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().reshape(-1)
            found = zlib.crc32(content.view(torch.uint8).numpy() if content.numel() else b"", found)
    return found
