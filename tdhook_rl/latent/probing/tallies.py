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
        >>> tally.codes.tolist(), tally.sums[:, 0].tolist()
        ([3, 7], [1.0, 2.0])
    """

    def __init__(self, *, width: int, groups: int = 16_384) -> None:
        self.codes = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, width, dtype=torch.float64)
        self._most = groups
        self._merged = False

    def add(self, codes: Tensor, values: Tensor) -> None:
        """Add rows.

        Args:
            codes: ``(rows,)``, the number of the group of each.
            values: ``(rows, width)``.
        """
        codes = torch.cat([self.codes, self._folded(codes)])
        self._put(codes, torch.cat([self.sums, values.double()]))
        if len(self.codes) > self._most:
            self._merged = True
            self._put(self._folded(self.codes), self.sums)

    def decay(self, factor: float) -> None:
        """Multiply all sums; groups of which nothing is left are forgotten."""
        if factor == 1:
            return
        self.sums = self.sums * factor
        left = self.sums.abs().sum(1) > _NOTHING
        self.codes, self.sums = self.codes[left], self.sums[left]

    def forget(self, columns: Tensor) -> None:
        """Set columns to zero."""
        self.sums[:, columns] = 0

    def _put(self, codes: Tensor, values: Tensor) -> None:
        self.codes, where = codes.unique(return_inverse=True)
        self.sums = torch.zeros(len(self.codes), values.shape[1], dtype=torch.float64).index_add_(0, where, values)

    def _folded(self, codes: Tensor) -> Tensor:
        return codes.remainder(self._most) if self._merged else codes
