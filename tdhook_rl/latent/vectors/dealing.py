"""Labels dealt out by chance: the same for a seed, in whatever parts the rows come."""

from __future__ import annotations

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
