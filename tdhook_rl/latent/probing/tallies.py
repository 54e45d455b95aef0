"""Sums by group that stream, decay and merge, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Tally"]

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
