"""Rows of a buffer beside the results of an analysis of it, and the episodes that they make up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError
from tdhook_rl.reading.going_on import GoingOn, breaks_of
from tdhook_rl.reading.order import ENDS, Courses, begins_told, counts_told, first_count, goes_on, numbers_told
from tdhook_rl.reading.reader import Reader
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.results import INDEX, load_results
from tdhook_rl.sites.missing import missing_value

#: Results of an analysis: as they are returned, or their folder.
Found: TypeAlias = TensorDictBase | str | Path
_DONE = tuple(("next", one) for one in ENDS)


def results_of(results: Found) -> TensorDictBase:
    """Results, whether they are given or their folder is; of an analysis that is not finished what is done."""
    return results if isinstance(results, TensorDictBase) else load_results(results, partial=True)


class Joined:
    """The rows of a source by their number (an entry that is a trajectory has several), with results beside them.

    Args:
        given: what was analysed.
        results: of the analysis, or their folder; no results unless given.

    Attributes:
        reader: reads the entries.
        count: how many rows there are.

    Raises:
        InputError: if the results are of other entries.
    """

    def __init__(self, given: Rows, results: Found | None = None) -> None:
        self.reader = Reader(given)
        self.count = self.reader.size * self.reader.rows
        self._results = None if results is None else results_of(results)
        self._place: Tensor | None = None
        if self._results is None:
            return
        index = self._results.get(INDEX, None)
        entries = torch.arange(len(self._results)) if index is None else index.reshape(len(index), -1)[:, 0]
        rows = self._results.batch_size[1:].numel()
        fewer = index is None and len(entries) < self.reader.size and not isinstance(results, str | Path)
        if int(entries.max()) >= self.reader.size or rows != self.reader.rows or fewer:
            raise InputError(
                f"the results are of {len(entries)} entries of {rows} rows each, up to entry {int(entries.max())}, and "
                f"the buffer has {self.reader.size} of {self.reader.rows}: give the buffer that was analysed"
                + ("; of an analysis that is not finished, its folder" if fewer and rows == self.reader.rows else "")
            )
        self._place = torch.full((self.reader.size,), -1)
        self._place[entries] = torch.arange(len(entries))

    def rows(self, numbers: Tensor) -> TensorDictBase:
        """Rows with their results, in the order in which they are named, and ``"index"``, their numbers.

        Results of rows that were not analysed are NaN, with false masks.
        """
        entries, which = (numbers // self.reader.rows).unique(return_inverse=True)
        found = self.reader.read(entries)
        data = (found if found.ndim == 1 else found.flatten(0, -1)).exclude(INDEX)
        picked = data[which * self.reader.rows + numbers % self.reader.rows].copy()
        if self._results is not None and self._place is not None:
            places = self._place[numbers // self.reader.rows]
            picked.update(self._beside(places, numbers % self.reader.rows))
        return picked.set(INDEX, numbers)

    def chunks(self, batch_size: int) -> Iterator[tuple[Tensor, TensorDictBase]]:
        """All rows but padding, without results: their numbers and these rows."""
        for first, last in self.reader.chunks(batch_size):
            found = self.reader.read(torch.arange(first, last))
            real = real_rows(found)
            numbers = torch.arange(first * self.reader.rows, last * self.reader.rows)
            flat = found if found.ndim == 1 else found.flatten(0, -1)
            if real is not None and not bool(real.all()):
                kept = real.reshape(-1).cpu()
                numbers, flat = numbers[kept], flat[kept]
            yield numbers, flat

    def courses(self, looking: str, batch_size: int = 1 << 14) -> Courses:
        """All rows but padding, episode by episode.

        Raises:
            InputError: if nothing says where an episode ends.
        """
        if self.reader.rows == 1:
            return self.reader.courses(looking)
        parts, ends, begins, names, counts = [], [], [], [], []
        going_on = GoingOn(self.count)
        for numbers, rows in self.chunks(batch_size):
            found = [one for key in _DONE if isinstance(one := rows.get(key, None), Tensor)]
            if not found:
                raise InputError(
                    f"{looking} reads rows of one episode, and no entry says where one ends: store {_DONE[0]}"
                )
            parts.append(numbers)
            ends.append(torch.stack([one.reshape(len(numbers), -1).any(1) for one in found]).any(0).cpu())
            begins.append(begins_told(rows))
            names.append(numbers_told(rows))
            counts.append(counts_told(rows))
            going_on.add(numbers, rows)
        stored = torch.full((self.count,), -1)
        stored[torch.cat(parts)] = torch.arange(sum(map(len, parts)))
        order = stored[self.reader.in_time(looking)]
        order = order[order >= 0]
        numbers, done = torch.cat(parts)[order], torch.cat(ends)[order]
        new = torch.ones(len(numbers), dtype=torch.bool)
        line = numbers // self.reader.source.raw(torch.arange(1)).batch_size[-1]  # an entry may hold several, time last
        new[1:] = line[1:] != line[:-1]
        over = new.clone() if self.reader.source.written(looking).over else torch.zeros_like(new)
        told, name, count = (
            None if any(one is None for one in each) else torch.cat(each)[order] for each in (begins, names, counts)
        )
        broken, resumed = going_on.breaks(numbers, done)
        apart, inside = torch.zeros_like(new), ~new[1:] & ~done[:-1]
        ended = torch.cat([~inside, done[-1:]])
        if name is not None:
            apart[1:] = inside & (name[1:] != name[:-1])
        self._require_time_last(looking, numbers, inside, apart, going_on)
        if count is not None:
            apart[1:] |= breaks_of(count[1:] == count[:-1] + 1, ~inside)
        new |= broken | apart
        new[1:] |= done[:-1]
        last = torch.cat([new[1:], new.new_ones(1)])
        # A trajectory that is stored whole begins where its line does, unless rows say which begin or go on.
        if told is not None:
            begun = told
        elif count is not None:
            begun = count == first_count(count, done)
        elif name is not None:
            begun = ~goes_on(name, new, last & ~done, going_on.sides(numbers, ended)) & ~over
        else:
            begun = ~over & ~resumed
        return Courses(numbers, new.long().cumsum(0) - 1, done[last], begun[new])

    def _require_time_last(
        self, looking: str, numbers: Tensor, inside: Tensor, apart: Tensor, going_on: GoingOn
    ) -> None:
        """Raise :class:`InputError` if rows go on from one entry to the next rather than within them.

        Args:
            looking: what asks, for messages.
            numbers: of rows, one line of time after the other.
            inside: which of them the following one should go on from.
            apart: which rows are of another trajectory than those before them.
            going_on: the states of all rows.
        """
        here, then = numbers[:-1][inside], numbers[1:][inside]
        able = here + self.reader.rows < self.count
        here, then = here[able], then[able]
        if int(apart.sum()) * 2 > int(inside.sum()) or going_on.other_way(here, then, here + self.reader.rows):
            raise InputError(
                f"{looking} reads rows of one episode, and rows that lie one after the other in an entry are of "
                "different ones: time is the last dimension of a batch; give it as data.transpose(0, 1)"
            )

    def _beside(self, places: Tensor, inside: Tensor) -> TensorDict:
        known, found = places >= 0, TensorDict({}, batch_size=[len(places)])
        assert self._results is not None
        for key, value in self._results.items(True, True):
            if key == INDEX:
                continue
            flat = value if self.reader.rows == 1 else value.flatten(1, self._results.ndim - 1)
            where = (places[known],) if self.reader.rows == 1 else (places[known], inside[known])
            shape = value.shape[self._results.ndim :]
            made = torch.full((len(places), *shape), missing_value(value.dtype), dtype=value.dtype)
            made[known] = flat[where].cpu()
            found.set(key, made)
        return found


@dataclass(frozen=True, kw_only=True)
class StoredEpisode:
    """An episode in a buffer.

    Attributes:
        number: in the order in which episodes are found.
        rows: the numbers of its rows, in the order of time.
        total: the sum of its rewards, discounted from its first row; of what is there.
        ended, begun: whether its end, and its beginning, is there.
        data: its rows with their results, ``(time,)``, where these were asked for; ``report.player`` shows it.
    """

    number: int
    rows: Tensor
    total: float
    ended: bool
    begun: bool
    data: Any = None

    @property
    def whole(self) -> bool:
        """Whether all of it is there."""
        return self.ended and self.begun
