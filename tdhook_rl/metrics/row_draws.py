"""Random numbers for rows: those of a row are the same however many rows are scored at once, and on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdhook_rl.arguments.seeds import stream_of

#: Rows that one generator draws for: one for each row would take longer than what is scored.
BLOCK = 16


class RowDraws:
    """Draws for some of the rows of a batch.

    Args:
        seed: of the user's.
        purpose: what is drawn.
        rows: the places of the rows in the batch.
    """

    def __init__(self, seed: int, purpose: str, rows: range) -> None:
        self._rows = rows
        blocks = range(rows.start // BLOCK, (rows.stop - 1) // BLOCK + 1)
        self._generators = [torch.Generator().manual_seed(stream_of(seed, purpose, block)) for block in blocks]

    def __call__(self, how: Callable[..., Tensor], like: Tensor, batch_dims: int) -> Tensor:
        """By ``torch.rand`` or ``torch.randn``, numbers of the shape of a tensor of these rows."""
        shape = (BLOCK, *like.shape[batch_dims:])
        drawn = torch.cat([how(shape, generator=one, dtype=like.dtype) for one in self._generators])
        first = self._rows.start % BLOCK
        return drawn[first : first + len(self._rows)].reshape(like.shape).to(like.device)
