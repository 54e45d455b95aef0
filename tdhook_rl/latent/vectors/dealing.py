"""Labels dealt out by chance: the same for a seed, in whatever parts the rows come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.errors import InputError

#: Rows that labels are dealt to at once.
_BLOCK = 1024


def check_dealing(shuffles: int, seed: int) -> None:
    """Raise an ``InputError`` for a number of draws, or a seed, that is none."""
    for name, value in (("shuffles", shuffles), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name}= is a whole number from 0 on, got {value!r:.80}")


def random_signs(draws: int, pairs: int, seed: int) -> Tensor:
    """For each draw a sign for each pair, ``(draws, pairs)``: which of the two states counts as which.

    Example:
        >>> signs = random_signs(3, 100, seed=0)
        >>> signs.shape, signs.unique().tolist()
        (torch.Size([3, 100]), [-1, 1])
    """
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (draws, pairs), dtype=np.int8) * 2 - 1)


class Dealer:
    """Deals a known number of positive labels out to a known number of rows, as a permutation of all labels would.

    In each block of rows the positive ones are as many as an urn gives, of which all that is left is drawn in the end.

    Args:
        draws: how many permutations, independent of each other.
        positive, rows: how many rows are positive, of how many.
        seed: which permutations.

    Example:
        >>> dealer = Dealer(draws=4, positive=3, rows=10, seed=0)
        >>> dealt = torch.cat([dealer.next(6), dealer.next(4)], 1)
        >>> dealt.shape, dealt.sum(1).tolist()
        (torch.Size([4, 10]), [3, 3, 3, 3])
    """

    def __init__(self, *, draws: int, positive: int, rows: int, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._left = np.full(draws, positive, dtype=np.int64)
        self._rows = rows
        self._ready = np.zeros((draws, 0), dtype=bool)

    def next(self, rows: int) -> Tensor:
        """Which of the next rows are positive, ``(draws, rows)``, bool."""
        while self._ready.shape[1] < rows:
            self._ready = np.concatenate([self._ready, self._block()], axis=1)
        given, self._ready = self._ready[:, :rows], self._ready[:, rows:]
        return torch.from_numpy(np.ascontiguousarray(given))

    def _block(self) -> np.ndarray:
        size = min(_BLOCK, self._rows)
        if size < 1:
            raise InputError("there are more rows than labels to deal out: what says which row is which gave others")
        found = np.zeros((len(self._left), size), dtype=bool)
        for draw, left in enumerate(self._left):
            here = self._generator.hypergeometric(left, self._rows - left, size)
            found[draw, self._generator.permutation(size)[:here]] = True
            self._left[draw] -= here
        self._rows -= size
        return found


class GroupDealer:
    """Deals labels out to whole groups: in an order of chance, until about as many rows as wanted are positive.

    Args:
        draws: how many times, independent of each other.
        positive: how many rows are positive.
        rows: of each group, by its number, how many rows it has.
        seed: which orders.

    Raises:
        InputError: for fewer than two groups.

    Example:
        >>> dealer = GroupDealer(draws=3, positive=4, rows={7: 2, 8: 2, 9: 2, 10: 2}, seed=0)
        >>> dealt = dealer.of(torch.tensor([7, 7, 8, 8, 9, 9, 10, 10]))
        >>> dealt.sum(1).tolist(), torch.equal(dealt[:, ::2], dealt[:, 1::2])
        ([4, 4, 4], True)
    """

    def __init__(self, *, draws: int, positive: int, rows: Mapping[int, int], seed: int) -> None:
        if len(rows) < 2:
            raise InputError("labels are dealt out to groups, and all rows are of one: leave groups= out")
        self._codes = torch.tensor(sorted(rows))
        sizes = np.array([rows[code] for code in self._codes.tolist()])
        generator = np.random.default_rng(seed)
        self._sides = np.zeros((draws, len(sizes)), dtype=bool)
        for draw in range(draws):
            order = generator.permutation(len(sizes))
            away = np.abs(sizes[order].cumsum()[:-1] - positive)  # both sides have a group
            self._sides[draw, order[: int(away.argmin()) + 1]] = True

    def of(self, groups: Tensor) -> Tensor:
        """Which rows of these groups are positive, ``(draws, rows)``, bool.

        Raises:
            InputError: for a group that was not there when rows were counted.
        """
        places = torch.searchsorted(self._codes, groups).clamp_max(len(self._codes) - 1)
        if not torch.equal(self._codes[places], groups):
            raise InputError("groups= gave other groups the second time: its answer may depend on nothing but the rows")
        return torch.from_numpy(self._sides[:, places.numpy()])
