"""Which entries of a source are analysed, and in which chunks: all of them, or those that are chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.dense import require_dense
from tdhook_rl.arguments.of_rows import require_of_each
from tdhook_rl.errors import InputError
from tdhook_rl.reading.reader import COVERED, Reader
from tdhook_rl.replay.manifest import described

Chosen = slice | range | Tensor | Sequence[int]
#: Of a batch: which of its entries.
Where = Callable[[TensorDictBase], Any]


class Selection:
    """Results are of entries in the order in which they lie; a place is an entry's number among those chosen.

    Args:
        reader: of all entries.
        entries: the ones that are chosen, in order; all of them unless given.
        asked: by what they were chosen, for the manifest.

    Attributes:
        size: how many there are.
        facts: what the manifest says of them; ``None`` where they are all there are.
    """

    def __init__(self, reader: Reader, entries: Tensor | None = None, asked: dict[str, Any] | None = None) -> None:
        self._reader = reader
        self._entries = entries
        self.size = reader.size if entries is None else len(entries)
        self.facts = None if entries is None else {**(asked or {}), "of": reader.size, "digest": _digest(entries)}

    @classmethod
    def of(
        cls,
        reader: Reader,
        rows: Chosen | None,
        where: Where | None,
        fraction: float | None,
        seed: int,
        batch_size: int,
    ) -> Selection:
        """What is left after one choice and the other: ``rows``, of these ``where``, of these ``fraction``.

        Raises:
            InputError: if nothing is left, or one of them does not choose entries.
        """
        if rows is None and where is None and fraction is None:
            return cls(reader)
        entries = torch.arange(reader.size) if rows is None else _named(rows, reader.size)
        if where is not None and len(entries):
            step = max(1, batch_size // reader.rows)
            several = len(entries) if len(entries) > step else 0
            entries = torch.cat([part[truth_of(where, reader.read(part), several)] for part in entries.split(step)])
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise InputError(f"fraction= is a share above 0, and 1 at most; got {fraction}")
            few = min(len(entries), max(1, round(fraction * len(entries))))
            drawn = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:few]
            entries = entries[drawn.sort().values]
        asked = {"rows": rows, "where": where, "fraction": fraction, "seed": None if fraction is None else seed}
        asked = {name: value for name, value in asked.items() if value is not None}
        if not len(entries):
            names = ", ".join(f"{name}=" for name in asked)
            raise InputError(f"{names} leaves none of {reader.size} entries to analyse")
        words = {name: str(one) if isinstance(one, slice | range) else described(one) for name, one in asked.items()}
        return cls(reader, entries, words)

    @property
    def chosen(self) -> Tensor | None:
        """The entries, where they are not all there are."""
        return self._entries

    def chunks(self, batch_size: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """The places of each chunk: its first, and that after its last."""
        if self._entries is None:
            yield from self._reader.chunks(batch_size, start)
            return
        step, first = max(1, batch_size // self._reader.rows), start
        while first < self.size:
            last = self._last(min(first + step, self.size))
            yield first, last
            first = last

    def covering(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Chunks that have these places; where chunks are whole trajectories, their first may begin before."""
        if self._entries is None:
            yield from self._reader.covering(start, stop)
            return
        first, end = start, self._last(stop)
        if self._reader.whole:
            first = int(torch.searchsorted(self._entries, self._reader.span(int(self._entries[start]))[0]))
        while first < end:
            last = self._last(min(first + max(1, COVERED // self._reader.rows), end))
            yield first, last
            first = last

    def entries(self, places: Tensor) -> Tensor:
        """Which entries have these places."""
        return places if self._entries is None else self._entries[places]

    def read_for(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The entries to read for these places, and where the wanted ones are among them."""
        wanted = self.entries(places)
        if self._entries is None or not self._reader.whole:
            return wanted, torch.arange(len(wanted))
        spans = dict.fromkeys(self._reader.span(entry) for entry in wanted.tolist())
        index = torch.cat([torch.arange(*span) for span in spans])
        return index, torch.searchsorted(index, wanted)

    def _last(self, last: int) -> int:
        """The place after the last of the trajectory of the place before this one."""
        if not self._reader.whole or self._entries is None:
            return last
        return int(torch.searchsorted(self._entries, self._reader.span(int(self._entries[last - 1]))[1]))


def _named(rows: Chosen, size: int) -> Tensor:
    """Entries by a slice, a mask or their numbers, each once and in order."""
    if isinstance(rows, slice):
        rows = range(size)[rows]
    try:
        found = torch.as_tensor([*rows] if isinstance(rows, range) else rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"rows= is a slice, a mask, or numbers of entries; got {rows!r:.80}") from error
    require_dense(found, "rows=")
    if found.dtype == torch.bool:
        if found.shape != (size,):
            raise InputError(f"rows= is a mask of shape {tuple(found.shape)}, where there are {size} entries")
        return found.cpu().nonzero().flatten()
    if found.numel() and (found.ndim != 1 or found.is_floating_point() or found.is_complex()):
        raise InputError(f"rows= is a slice, a mask, or numbers of entries; got {tuple(found.shape)} {found.dtype}")
    found = found.cpu().reshape(-1).long()
    if len(found) == size > 2 and bool(((found == 0) | (found == 1)).all()):
        raise InputError(
            f"rows= has a 0 or a 1 for each of {size} entries, which would name the first two over and over: a mask is "
            "boolean, rows.bool()"
        )
    outside = found[(found < -size) | (found >= size)]
    if len(outside):
        raise InputError(f"rows= names entry {int(outside[0])}, and there are {size}: 0 to {size - 1}")
    return (found % size).unique()


def truth_of(where: Where, batch: TensorDictBase, several: int = 0) -> Tensor:
    """For each entry of a batch whether it is what is asked for.

    Args:
        where: the function.
        batch: some entries.
        several: of how many these are some; 0 where they are all.

    Raises:
        InputError: if the function gives anything but a truth value for each, or another one for other company.
    """
    mask = _truth(where, batch)
    if several:
        require_of_each(lambda part: _truth(where, part), batch, mask, what="where=", rows=several)
    return mask


def _truth(where: Where, batch: TensorDictBase) -> Tensor:
    found = asked(where, batch, what="where=", reads_only=True)
    mask = torch.as_tensor(found) if found is not None else torch.zeros(0)
    if mask.dtype != torch.bool or mask.numel() != len(batch):
        raise InputError(
            f"where= is given a batch of {len(batch)} entries (batch size {tuple(batch.batch_size)}), and returns a "
            f"truth value for each; it returned {tuple(mask.shape)} {mask.dtype}. Where an entry is a trajectory, say "
            "which by any(-1) or all(-1)"
        )
    return mask.cpu().reshape(-1)


def _digest(entries: Tensor) -> str:
    return hashlib.blake2b(entries.numpy().tobytes(), digest_size=16).hexdigest()
