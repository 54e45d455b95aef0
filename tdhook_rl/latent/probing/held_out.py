"""What a probe scores on rows that it was not fitted on: sums by group, pooled over batches, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.statistics import Interval

#: What is left of a group that counts no more.
_NOTHING = 1e-6


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

    @property
    def codes(self) -> Tensor:
        return torch.tensor(list(self._rows), dtype=torch.int64)

    @property
    def sums(self) -> Tensor:
        return self._table[: len(self._rows)]

    def add(self, codes: Tensor, values: Tensor) -> None:
        """Add rows.

        Args:
            codes: ``(rows,)``, the number of the group of each.
            values: ``(rows, width)``.
        """
        groups, where = self._folded(codes).unique(return_inverse=True)
        places = torch.tensor(
            [self._rows.setdefault(code, len(self._rows)) for code in groups.tolist()], dtype=torch.long
        )
        if len(self._rows) > len(self._table):  # twice as long, so that growing costs little in all
            grown = torch.zeros(2 * len(self._rows), self._table.shape[1], dtype=torch.float64)
            grown[: len(self._table)] = self._table
            self._table = grown
        self._table.index_add_(0, places[where], values.double())
        if len(self._rows) > self._most:
            self._merged = True
            self._rebuild(self._folded(self.codes), self.sums)

    def decay(self, factor: float) -> None:
        """Multiply all sums; groups of which nothing is left are forgotten."""
        if factor == 1:
            return
        self._table.mul_(factor)
        left = self.sums.abs().sum(1) > _NOTHING
        if not bool(left.all()):
            self._rebuild(self.codes[left], self.sums[left])

    def forget(self, columns: Tensor) -> None:
        """Set columns to zero."""
        self._table[:, columns] = 0

    def _rebuild(self, codes: Tensor, sums: Tensor) -> None:
        self._rows, self._table = {}, torch.zeros(0, sums.shape[1], dtype=torch.float64)
        self.add(codes, sums)

    def _folded(self, codes: Tensor) -> Tensor:
        return codes.remainder(self._most) if self._merged else codes


#: Histograms of scores reach so many spreads from the middle between the classes, in bins of a sixteenth of a spread.
_REACH, _BINS = 8.0, 257
#: Numbers that the histograms of one grouping may take.
_ENTRIES = 600_000


class HitTally:
    """How many rows of each class (two for each of several labels) there are, and were classified rightly, by group."""

    def __init__(self, *, columns: int, groupings: int) -> None:
        self._columns = columns
        self._tallies = [Tally(width=2 * columns) for _ in range(groupings)]

    def add(self, codes: Sequence[Tensor], of_class: Tensor, right: Tensor) -> None:
        """Add rows.

        Args:
            codes: for each grouping ``(rows,)``, the group of each row.
            of_class: ``(rows, columns)``, bool: the column that a row belongs to.
            right: ``(rows, columns)``, bool: and whether it was classified rightly.
        """
        values = torch.cat([of_class & right, of_class], 1)
        for tally, code in zip(self._tallies, codes, strict=True):
            tally.add(code, values)

    def decay(self, factor: float) -> None:
        """Let what was scored before count for less."""
        for tally in self._tallies:
            tally.decay(factor)

    def forget(self, columns: Tensor) -> None:
        """Drop the rows of some classes."""
        for tally in self._tallies:
            tally.forget(torch.cat([columns, columns]))

    @property
    def rows(self) -> Tensor:
        """``(columns,)``: how many rows of each class there are."""
        return self._tallies[0].sums[:, self._columns :].sum(0)

    def accuracy(self, chosen: Tensor, confidence: float) -> Interval:
        """Balanced accuracy over the chosen columns; of several groupings, the widest interval."""
        found = []
        for tally in self._tallies:
            right, rows = (
                (tally.sums * torch.cat([chosen, chosen])).numpy().reshape(-1, 2, self._columns).swapaxes(0, 1)
            )
            found.append(statistics.balanced_accuracy(right, rows, confidence=confidence))
        return widest(found)


class ScoreHistograms:
    """Histograms of the scores of rows with and without each of several labels, in each group.

    Scores are in units of their spread within classes, from the middle between the classes, so that those of
    today's probe and yesterday's go together and the resolution, a sixteenth of a spread, is the same for all.
    """

    def __init__(self, *, labels: int, groupings: int) -> None:
        self._labels = labels
        width = labels * 2 * _BINS
        most = max(_ENTRIES // width, 32)
        self._tallies = [Tally(width=width, groups=most) for _ in range(groupings)]

    def add(self, codes: Sequence[Tensor], scores: Tensor, labels: Tensor, middle: Tensor, spread: Tensor) -> None:
        """Add rows.

        Args:
            codes: for each grouping ``(rows,)``, the group of each row.
            scores: ``(rows, labels)``, float64.
            labels: ``(rows, labels)``, bool.
            middle, spread: ``(labels,)``, of the scores.
        """
        scaled = (scores - middle) / spread.clamp_min(1e-9 * middle.abs()).clamp_min(1e-300)
        bins = ((scaled.clamp(-_REACH, _REACH) + _REACH) * (_BINS - 1) / (2 * _REACH)).round().long()
        column = torch.arange(self._labels) * 2 * _BINS + labels.long() * _BINS + bins
        for tally, code in zip(self._tallies, codes, strict=True):
            # The groups of this batch alone: a row of the table for each row of data would take all memory.
            groups, where = code.unique(return_inverse=True)
            table = torch.zeros(len(groups), tally.sums.shape[1], dtype=torch.float64)
            flat = (where[:, None] * table.shape[1] + column).reshape(-1)
            table.view(-1).index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64))
            tally.add(groups, table)

    def decay(self, factor: float) -> None:
        """Let what was scored before count for less."""
        for tally in self._tallies:
            tally.decay(factor)

    def area(self, label: int, confidence: float) -> Interval:
        """The area under the curve of one label; of several groupings, the widest interval."""
        found = []
        for tally in self._tallies:
            negative, positive = tally.sums.numpy().reshape(-1, self._labels, 2, _BINS)[:, label].swapaxes(0, 1)
            found.append(statistics.area_under_curve(positive, negative, confidence=confidence))
        return widest(found)


def widest(intervals: Sequence[Interval]) -> Interval:
    """Of one estimate by several groupings the least sure; none, if one of them gives none."""
    return max(intervals, key=lambda one: one.half_width if one.known else math.inf)
