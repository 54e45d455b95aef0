"""Policies of which rows are computed some at a time: what is found of a row is of that row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.near import largest_of, near
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError
from tdhook_rl.metrics.untrained import own_generators

#: What a number may differ by, of the largest.
_OF_LARGEST = 1e-4
#: Rows that are computed alone.
_TRIED = 5


def require_alone(
    compute: Callable[[int], Mapping[Any, Tensor]], found: Mapping[Any, Tensor], rows: int, *, what: str, total: int
) -> None:
    """Raise if most of some rows are something else when they are computed alone, as of a mean over the batch.

    Some, since a unit that is at its kink may go either way. What draws is another each time, and is left.

    Args:
        compute: of one of these rows its results, ``(1, ...)``.
        found: what was found of all of them together, ``(rows, ...)``.
        rows: how many these are.
        what: whose results they are, for the message.
        total: how many there are in all.

    Raises:
        InputError: that names a result.
    """
    places = torch.linspace(0, rows - 1, min(rows, _TRIED)).round().long().unique().tolist()
    if rows < 2:
        return
    with own_generators(stream_of(0, "alone")):
        alone = {place: compute(place) for place in places}
    for key, together in found.items():
        largest = largest_of(together)
        others = [place for place in places if not near(alone[place][key][0], together[place], _OF_LARGEST, largest)]
        if 2 * len(others) <= len(places):
            continue
        with own_generators(stream_of(0, "again")):
            again = compute(others[0])[key][0]
        if not near(again, alone[others[0]][key][0], _OF_LARGEST, largest):
            continue
        raise InputError(
            f"{key!r} of a row is something else when other rows are computed with it: {what} looks across the rows of "
            f"a batch (a mean, a softmax over its first dimension), and of {total} rows {rows} are computed at a time, "
            f"so that results would depend on batch_size=: let it work row by row, or give batch_size={total}"
        )
