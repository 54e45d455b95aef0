"""Rows in storage order, whatever holds them, and whatever is stored: transitions, trajectories, or several of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.errors import InputError
from tdhook_rl.reading.going_on import GoingOn
from tdhook_rl.reading.order import Courses, Trajectories
from tdhook_rl.reading.sources import Rows, source_of
from tdhook_rl.reading.transforms import Window, followed_by, require_alike, require_at_rest, transform_name, window_of

#: A chunk is read again together with so many entries before and after it, if its transforms are not known.
COMPANY = 4
#: Rows of which the trajectory is looked up at once.
LOOKED_UP = 1 << 14
#: Bytes of a chunk unless its rows are given, and these are no fewer and no more.
CHUNK_BYTES, LEAST, MOST = 16 << 20, 1024, 8192
#: Rows that are computed again at once.
COVERED = 256


@checked
def in_order(buffer: Rows, batch_size: int = 1024, start: int = 0) -> Iterator[tuple[int, TensorDictBase]]:
    """Batches of a buffer, or of another source, in storage order, as ``buffer.sample`` would give these rows.

    Transforms that look at other rows of a trajectory (``CatFrames``, ``NextStateReconstructor``) are given these rows,
    whatever the batch. Other transforms that TorchRL does not promise to work row by row are tried in other company at
    every batch, which takes the time of a second reading.

    Args:
        buffer: what :func:`analyze` takes; it is only read.
        batch_size: rows read at once, which changes nothing in them. Where an entry of the storage is a trajectory, or
            the storage has several dimensions, as many whole entries as have so many rows, and at least one.
        start: the entry to begin with.

    Yields:
        the index of the first entry of a batch, and the batch, entries first; the last may be smaller.

    Raises:
        InputError: if there are no rows, or no TensorDicts; for an ensemble; if a transform or ``collate_fn``
            gives a row other values, or another number of rows, when other rows are read with it (a mean over the
            batch, random crops, a count), and by name.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(10))
        >>> _ = buffer.extend(TensorDict({"observation": torch.randn(10, 3)}, batch_size=10))
        >>> [(first, len(batch)) for first, batch in in_order(buffer, 4)]
        [(0, 4), (4, 4), (8, 2)]
    """
    reader = Reader(buffer)
    for first, last in reader.chunks(batch_size, start):
        yield first, reader.read(torch.arange(first, last))


class Reader:
    """Reads entries as they are in their trajectory, whichever are read with them.

    Args:
        given: what :func:`analyze` takes.
        whole: where rows are stored one by one, let chunks end where trajectories do.

    Attributes:
        source: what it reads from.
        size: entries along the first dimension of the storage.
        rows: rows in each entry.
        whole: whether chunks end where trajectories do.

    Raises:
        InputError: as of :func:`in_order`.
    """

    def __init__(self, given: Any, whole: bool = False) -> None:
        self.source = source_of(given)
        require_at_rest(self.source.transforms)
        self.size, self.rows = self.source.entries, self.source.rows
        windows = [window_of(one) for one in self.source.transforms]
        single = self.source.raw(torch.arange(1)).ndim == 1
        self._window: Window | None = None
        self.whole = whole and single
        if any(windows) and single:
            self._window = Window.sum([one for one in windows if one is not None])
        if self.whole or self._window is not None:
            self._trajectories = self._look_up("horizon='trajectory'" if self.whole else self.looking)

    def batch_size(self) -> int:
        """As many rows as take about so many bytes: enough that what is done once for each chunk costs little."""
        row = sum(one.nbytes for one in self.source.raw(torch.arange(1)).values(True, True) if isinstance(one, Tensor))
        return min(max(CHUNK_BYTES * self.rows // max(row, 1), LEAST), MOST)

    def chunks(self, batch_size: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """The entries of each chunk of about so many rows: its first, and that after its last."""
        require_counts(batch_size=batch_size)
        step = max(1, batch_size // self.rows)
        first = start
        while first < self.size:
            last = min(first + step, self.size)
            last = self._trajectories.end(last - 1) if self.whole else last
            yield first, last
            first = last

    def covering(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Chunks that have these entries; where chunks are whole trajectories, their first may begin before."""
        first = self._trajectories.begin(start) if self.whole else start
        last = self._trajectories.end(stop - 1) if self.whole else stop
        while first < last:
            until = min(first + max(1, COVERED // self.rows), last)
            until = self._trajectories.end(until - 1) if self.whole else until
            yield first, until
            first = until

    def span(self, entry: int) -> tuple[int, int]:
        """The first entry of the trajectory of this one, and that after its last; where chunks end with trajectories.

        Raises:
            InputError: if its rows are not one after the other.
        """
        return self._trajectories.begin(entry), self._trajectories.end(entry)

    def apart(self, index: Tensor) -> tuple[Tensor, ...]:
        """The entries of whole trajectories, one after the other, by trajectory."""
        spans = dict.fromkeys(self.span(entry) for entry in index.tolist())
        return index.split([last - first for first, last in spans])

    def courses(self, looking: str) -> Courses:
        """All rows trajectory by trajectory, where each entry is a row; ``looking`` is what asks, for messages.

        Raises:
            InputError: if nothing says where a trajectory ends.
        """
        return self._look_up(looking).courses()

    def in_time(self, looking: str) -> Tensor:
        """The numbers of all rows, those of one line in the order in which they were written.

        Raises:
            InputError: if the buffer does not keep that order.
        """
        steps = self.source.raw(torch.arange(1)).batch_size[-1]  # an entry may hold several lines, time last
        return self.source.written(looking).in_time(self.size, self.rows, 1 if self.rows == 1 else steps)

    def turned(self, data: TensorDictBase, back: bool = False) -> TensorDictBase:
        """Lines of a ring, from the step that was written first on; or, back, as they are stored."""
        turn = self.source.turn
        if not turn:
            return data
        steps = torch.arange(data.batch_size[-1]).roll(turn if back else -turn)
        return data[..., steps]

    def read(self, index: Tensor) -> TensorDictBase:
        """These entries, collated and transformed.

        Raises:
            InputError: if what they are depends on what is read with them.
        """
        found = self._read(index, self._window)
        if not self.source.known:
            low, high = max(0, int(index.min()) - COMPANY), min(self.size, int(index.max()) + 1 + COMPANY)
            company = torch.cat([torch.arange(low, int(index.min())), index, torch.arange(int(index.max()) + 1, high)])
            wider = None if self._window is None else self._window.wider(COMPANY)
            alone, transforms = self.source.raw, self.source.transforms
            require_alike(lambda rows: self._read(rows, wider), alone, transforms, index, found, company)
        return found

    def incomplete(self, index: Tensor) -> Tensor:
        """Which of these entries lack rows that a transform reads, since a ring has been written over them."""
        if self._window is None:
            return torch.zeros(len(index), dtype=torch.bool)
        return self._trajectories.incomplete(index, self._window)

    @property
    def looking(self) -> str:
        """The transforms that look at other rows."""
        return ", ".join(transform_name(one) for one in self.source.transforms if window_of(one) is not None)

    # ------------------------------------------------------------------ reading

    def _read(self, index: Tensor, window: Window | None) -> TensorDictBase:
        if window is None:
            return self._transformed(index)
        parts, places = [], []
        for place, rows, inside in self._trajectories.stretches(index, window):
            parts.append(self._transformed(rows)[inside])
            places.append(place)
        found = torch.cat(parts)
        return found[torch.cat(places).argsort()]

    def _transformed(self, rows: Tensor) -> TensorDictBase:
        data: Any = self.source.raw(rows)
        if self.source.transforms and self.source.turn:
            data = self.turned(data)
        for transform in self.source.transforms:
            data = followed_by(data, transform)
        if not is_tensor_collection(data) or data.ndim == 0 or len(data) != len(rows):
            shape = tuple(data.batch_size) if is_tensor_collection(data) else type(data).__name__
            names = ", ".join(transform_name(one) for one in self.source.transforms) or "the collate_fn"
            raise InputError(
                f"the buffer gives a batch of shape {shape} for {len(rows)} entries ({names}), so its "
                "rows are not those that are stored: analyse a buffer without that transform"
            )
        return self.turned(data, back=True) if self.source.transforms and self.source.turn else data

    def _look_up(self, looking: str) -> Trajectories:
        written = self.source.written(looking)
        keys = Trajectories.keys(written, self.source.transforms)
        parts, going_on = [], GoingOn(self.size)
        for first in range(0, self.size, LOOKED_UP):
            rows = self.source.raw(torch.arange(first, min(first + LOOKED_UP, self.size)))
            parts.append(rows.select(*keys, strict=False))
            going_on.add(slice(first, first + len(rows)), rows)
        return Trajectories(written, torch.cat(parts), looking, going_on)
