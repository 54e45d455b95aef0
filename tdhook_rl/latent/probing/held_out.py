"""What a probe scores on rows that it was not fitted on: sums by group, pooled over batches, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.statistics import Interval

#: What is left of a group that counts no more.
_NOTHING = 1e-6
#: Histograms of scores reach so many spreads from the middle between the classes, in bins of a sixteenth of a spread.
_REACH, _BINS = 8.0, 257
#: Numbers that the histograms of one grouping may take.
_ENTRIES = 600_000


@dataclass(frozen=True)
class Grouped:
    """Rows by group.

    Attributes:
        numbers: ``(groups,)``, the numbers of the groups, each once.
        where: ``(rows,)``, which of them each row is of.
    """

    numbers: Tensor
    where: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> Grouped:
        return cls(*codes.unique(return_inverse=True))


class Tally:
    """A sum of vectors for each group of rows.

    Args:
        width: the length of a vector.
        groups: how many are told apart. Beyond that they are put together at random, by their number: fewer and larger
            groups, independent as before, so that sums over all stay exact and intervals by group stay right.

    Attributes:
        codes: ``(groups,)``, int64: their numbers.
        sums: ``(groups, width)``, float64.

    Example:
        >>> tally = Tally(width=1)
        >>> tally.add(torch.tensor([7, 3, 7]), torch.tensor([[1.0], [1.0], [1.0]]))
        >>> dict(zip(tally.codes.tolist(), tally.sums[:, 0].tolist()))
        {3: 1.0, 7: 2.0}
    """

    def __init__(self, *, width: int, groups: int = 16_384) -> None:
        self._rows: dict[int, int] = {}  # where each group is in the table, in the order of the table
        self._table = torch.zeros(0, width, dtype=torch.float64)
        self._most = groups
        self._merged = False
        self._unit = 1.0  # what a one in the table counts: a decay of all sums is one of this number

    @property
    def codes(self) -> Tensor:
        return torch.tensor(list(self._rows), dtype=torch.int64)

    @property
    def sums(self) -> Tensor:
        return self.of(slice(None))

    def of(self, columns: Tensor | slice) -> Tensor:
        """``(groups, columns)``, some of the sums."""
        found = self._table[: len(self._rows), columns]
        return found if self._unit == 1 else found * self._unit

    def add(self, codes: Tensor | Grouped, values: Tensor) -> None:
        """Add rows.

        Args:
            codes: ``(rows,)``, the number of the group of each; or the groups.
            values: ``(rows, width)``.
        """
        values = values.double()
        self._put(codes, values if self._unit == 1 else values / self._unit)
        self._bound()

    def add_at(self, codes: Tensor | Grouped, columns: Tensor, counted: Tensor | None = None) -> None:
        """Add one to some entries of the group of each row.

        Args:
            codes: as of :meth:`add`.
            columns: ``(rows, k)``, which entries.
            counted: ``(rows, k)``, whether it is added; always unless given.
        """
        flat = self._places(codes)[:, None] * self._table.shape[1] + columns
        flat = flat.reshape(-1) if counted is None else flat[counted]
        ones = torch.full((len(flat),), 1 / self._unit, dtype=torch.float64)
        self._table.view(-1).index_add_(0, flat, ones)
        self._bound()

    def _bound(self) -> None:
        if len(self._rows) > self._most:
            self._settle()
        if len(self._rows) > self._most:
            self._merged = True
            self._rebuild(self.codes, self.sums)

    def _put(self, codes: Tensor | Grouped, values: Tensor) -> None:
        places = self._places(codes)
        self._table.index_add_(0, places, values)

    def _places(self, codes: Tensor | Grouped) -> Tensor:
        """Where the group of each row is in the table; new ones come at its end."""
        groups = codes if isinstance(codes, Grouped) else Grouped.of(codes)
        numbers = groups.numbers.remainder(self._most) if self._merged else groups.numbers
        places = torch.tensor(
            [self._rows.setdefault(code, len(self._rows)) for code in numbers.tolist()], dtype=torch.long
        )
        if len(self._rows) > len(self._table):  # twice as long, so that growing costs little in all
            grown = _blank(2 * len(self._rows), self._table.shape[1])
            grown[: len(self._table)] = self._table
            self._table = grown
        return places[groups.where]

    def decay(self, factor: float) -> None:
        """Multiply all sums; groups of which nothing is left are forgotten now and then."""
        self._unit *= factor
        if self._unit < _NOTHING:
            self._settle()

    def spread(self, places: Tensor, width: int) -> Tally:
        """The same groups in a table of other columns.

        Args:
            places: where each column goes; -1: nowhere.
            width: how many there are then.
        """
        wider = Tally(width=width, groups=self._most)
        wider._rows, wider._merged, wider._unit = dict(self._rows), self._merged, self._unit
        wider._table = torch.zeros(len(self._table), width, dtype=torch.float64)
        kept = places >= 0
        wider._table[:, places[kept]] = self._table[:, kept]
        return wider

    def merge(self, other: Tally) -> None:
        """Add the sums of another; where one has put groups together, both have."""
        if other._merged and not self._merged:
            self._merged = True
            self._rebuild(self.codes, self.sums)
        self.add(other.codes, other.sums)

    @property
    def folded(self) -> bool:
        """Whether groups were put together."""
        return self._merged

    def forget(self, columns: Tensor) -> None:
        """Set columns to zero."""
        self._table[:, columns] = 0

    def _settle(self) -> None:
        """Forget the groups of which nothing is left."""
        table = self._table[: len(self._rows)]
        left = torch.linalg.vector_norm(table, 1, dim=1) * self._unit > _NOTHING
        kept = left.nonzero().squeeze(-1)
        if len(kept) < len(table):
            self._rows = {code: place for place, code in enumerate(self.codes[kept].tolist())}
            self._table = _blank(2 * len(kept), table.shape[1])
            torch.index_select(table, 0, kept, out=self._table[: len(kept)])
        self._table[: len(kept)].mul_(self._unit)
        self._unit = 1.0

    def _rebuild(self, codes: Tensor, sums: Tensor) -> None:
        self._rows, self._table, self._unit = {}, torch.zeros(0, sums.shape[1], dtype=torch.float64), 1.0
        self._put(codes, sums)


def _blank(rows: int, width: int) -> Tensor:
    """Zeros, of which only the rows that are written take memory, and the time to get it."""
    return torch.from_numpy(np.zeros((rows, width)))


class HitTally:
    """How many rows of each class (two for each of several labels) there are, and were classified rightly, by group."""

    def __init__(self, *, columns: int, groupings: int) -> None:
        self._columns = columns
        self._tallies = [Tally(width=2 * columns) for _ in range(groupings)]
        self._among = torch.zeros(columns, 3, dtype=torch.float64)  # rows, by how many classes the probe knew

    def add(
        self, codes: Sequence[Tensor | Grouped], of_class: Tensor, right: Tensor, known: Tensor | None = None
    ) -> None:
        """Add rows.

        Args:
            codes: for each grouping ``(rows,)``, the group of each row.
            of_class: ``(rows, columns)``, bool: the column that a row belongs to.
            right: ``(rows, columns)``, bool: and whether it was classified rightly.
            known: ``(columns,)``, among how many classes it was, 0 for one that is not among them; two unless given.
        """
        if known is not None:
            self._among = _padded(self._among, int(known.max()) + 1)
            self._among.scatter_add_(1, known[:, None], of_class.sum(0)[:, None].double())
        values = torch.cat([of_class & right, of_class], 1)
        for tally, code in zip(self._tallies, codes, strict=True):
            tally.add(code, values)

    def decay(self, factor: float) -> None:
        """Let what was scored before count for less."""
        self._among *= factor
        for tally in self._tallies:
            tally.decay(factor)

    def forget(self, columns: Tensor) -> None:
        """Drop the rows of some classes."""
        self._among[columns] = 0
        for tally in self._tallies:
            tally.forget(torch.cat([columns, columns]))

    def merge(self, other: HitTally) -> None:
        """Add the rows of another."""
        width = max(self._among.shape[1], other._among.shape[1])
        self._among = _padded(self._among, width) + _padded(other._among, width)
        for tally, its in zip(self._tallies, other._tallies, strict=True):
            tally.merge(its)

    def spread(self, columns: Tensor, width: int) -> HitTally:
        """The same rows in a table of more columns.

        Args:
            columns: where each column goes.
            width: how many there are then.
        """
        wider = HitTally(columns=width, groupings=len(self._tallies))
        places = torch.cat([columns, columns + width])
        wider._tallies = [tally.spread(places, 2 * width) for tally in self._tallies]
        wider._among = torch.zeros(width, self._among.shape[1], dtype=torch.float64)
        wider._among[columns] = self._among
        return wider

    @property
    def tables(self) -> list[Tally]:
        """For each grouping the sums by group: right ones, and rows."""
        return self._tallies

    @property
    def rows(self) -> Tensor:
        """``(columns,)``: how many rows of each class there are."""
        return self.rows_of(slice(None))

    def rows_of(self, columns: slice) -> Tensor:
        """The same, of some columns."""
        start, stop, _ = columns.indices(self._columns)
        return self._tallies[0].of(slice(self._columns + start, self._columns + stop)).sum(0)

    def accuracy(self, chosen: Tensor, confidence: float) -> Interval:
        """Balanced accuracy over the chosen columns; of several groupings, the widest interval."""
        columns = self.columns(chosen)
        parts = (tally.of(columns).numpy() for tally in self._tallies)
        return widest([
            statistics.balanced_accuracy(*np.split(one, 2, axis=1), confidence=confidence) for one in parts
        ])  # fmt: skip

    def chance(self, chosen: Tensor) -> float:
        """The balanced accuracy of a guess over the chosen columns; NaN of fewer than two.

        Where rows were judged while fewer classes were known, a guess was right more often.
        """
        classes = int(chosen.sum())
        among = self._among[chosen]
        if classes < 2 or not bool(among[:, 1:classes].any()):
            return 1 / classes if classes > 1 else math.nan
        right = among[:, 1:] / torch.arange(1, among.shape[1]).clamp(2, classes)
        return float((right.sum(1) / among.sum(1)).nanmean())

    def words(self, chosen: Tensor) -> list[str]:
        """What has to be known where chance is more than that of so many classes."""
        chance, among = self.chance(chosen), self._among[chosen]
        if not chance * len(among) > 1.02:
            return []
        fewer = float(among[:, 1 : len(among)].sum() / among.sum())
        return [f"{fewer:.0%} of the held-out rows were judged while fewer classes were known: chance is {chance:.2f}"]

    def columns(self, chosen: Tensor) -> Tensor:
        """Where the tables have how many rows of the chosen columns are right, and then how many there are."""
        columns = chosen.nonzero().squeeze(-1)
        return torch.cat([columns, self._columns + columns])


def _padded(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, max(width - rows.shape[1], 0)))


class ScoreHistograms:
    """Histograms of the scores of rows with and without each of several labels, in each group.

    Scores are in units of their spread within classes, from the middle between the classes, so that those of
    today's probe and yesterday's go together and the resolution, a sixteenth of a spread, is the same for all.
    """

    def __init__(self, *, labels: int, groupings: int, sources: int = 1) -> None:
        self._labels, self._sources = labels, sources
        width = labels * 2 * _BINS
        most = max(_ENTRIES // width, 32)
        self._tallies = [Tally(width=sources * width, groups=most) for _ in range(groupings)]

    def add(
        self, codes: Sequence[Tensor | Grouped], scores: Tensor, labels: Tensor, middle: Tensor, spread: Tensor,
        usable: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add rows.

        Args:
            codes: for each grouping ``(rows,)``, the group of each row.
            scores: ``(rows, sources, labels)``, float64; with one source ``(rows, labels)``.
            labels: ``(rows, labels)``, bool.
            middle, spread: ``(sources, labels)``, of the scores.
            usable: ``(rows, sources, labels)``, which scores count; all unless given.
        """
        scores = scores.view(len(scores), self._sources, self._labels)
        scaled = (scores - middle) / spread.clamp_min(1e-9 * middle.abs()).clamp_min(1e-300)
        bins = ((scaled.clamp(-_REACH, _REACH) + _REACH) * (_BINS - 1) / (2 * _REACH)).round().long()
        first = torch.arange(self._sources * self._labels).view(self._sources, self._labels) * 2 * _BINS
        column = (bins + (labels.long() * _BINS)[:, None] + first).flatten(1)
        counted = None if usable is None else usable.flatten(1)
        for tally, code in zip(self._tallies, codes, strict=True):
            tally.add_at(code, column, counted)

    def decay(self, factor: float) -> None:
        """Let what was scored before count for less."""
        for tally in self._tallies:
            tally.decay(factor)

    def without(self, label: int) -> ScoreHistograms:
        """The histograms of the other labels."""
        fewer = ScoreHistograms(labels=self._labels - 1, groupings=len(self._tallies), sources=self._sources)
        kept = torch.arange(self._labels) != label
        places = torch.full((self._sources, self._labels, 2 * _BINS), -1)
        places[:, kept] = torch.arange(self._sources * (self._labels - 1) * 2 * _BINS).view(
            self._sources, self._labels - 1, -1
        )
        width = self._sources * (self._labels - 1) * 2 * _BINS
        fewer._tallies = [tally.spread(places.flatten(), width) for tally in self._tallies]
        return fewer

    def merge(self, other: ScoreHistograms) -> None:
        """Add the rows of another."""
        for tally, its in zip(self._tallies, other._tallies, strict=True):
            tally.merge(its)

    def area(self, label: int, confidence: float, source: int = 0) -> Interval:
        """The area under the curve of one label; of several groupings, the widest interval."""
        start = (source * self._labels + label) * 2 * _BINS
        found = []
        for tally in self._tallies:
            negative, positive = tally.of(slice(start, start + 2 * _BINS)).numpy().reshape(-1, 2, _BINS).swapaxes(0, 1)
            found.append(statistics.area_under_curve(positive, negative, confidence=confidence))
        return widest(found)


def widest(intervals: Sequence[Interval]) -> Interval:
    """Of one estimate by several groupings the least sure; none, if one of them gives none."""
    return max(intervals, key=lambda one: one.half_width if one.known else math.inf)


def aligned(
    first: Tally, own: Tensor | slice, second: Tally, theirs: Tensor | slice
) -> tuple[np.ndarray, np.ndarray] | None:
    """Some sums of two tallies, a row for each group of either, in the same order."""
    if first.folded != second.folded:
        return None
    codes = torch.cat([first.codes, second.codes]).unique()
    found = []
    for tally, columns in ((first, own), (second, theirs)):
        part = tally.of(columns)
        sums = torch.zeros(len(codes), part.shape[1], dtype=torch.float64)
        sums[torch.searchsorted(codes, tally.codes)] = part
        found.append(sums.numpy())
    return found[0], found[1]
