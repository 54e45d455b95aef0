"""What a probe scores on rows that it was not fitted on, pooled over batches, by group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.latent.probing.tallies import Tally
from tdhook_rl.statistics import Interval

__all__ = ["HitTally", "ScoreHistograms", "widest"]

#: Histograms of scores reach so many spreads from the middle between the classes, in bins of a sixteenth of a spread.
_REACH, _BINS = 8.0, 257
#: Numbers that the histograms of one grouping may take.
_ENTRIES = 600_000


class HitTally:
    """How many rows of each class there are, and were classified rightly, in each group.

    Args:
        columns: classes; two for each label of several.
        groupings: how many ways there are to group the rows.
    """

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

    Args:
        labels: how many there are.
        groupings: how many ways there are to group the rows.
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
