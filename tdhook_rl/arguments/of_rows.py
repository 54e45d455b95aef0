"""Functions of rows that are read some at a time: what they say of a row is of that row alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.near import largest_of, near
from tdhook_rl.errors import InputError, warn

#: What a number may differ by, of the largest.
_OF_LARGEST = 1e-5


def require_of_each(
    ask: Callable[[TensorDictBase], Tensor], batch: TensorDictBase, found: Tensor, *, what: str, rows: int
) -> None:
    """Raise if a function says of some rows something else when it is asked of them alone.

    A median, a rank or a running sum is of the rows that are read together, which are other ones for another
    ``batch_size=``. Of a function that fails of a row alone nothing is told, which is said.

    Args:
        ask: asks it of some rows, ``(rows, ...)``.
        batch: some rows.
        found: what it said of them.
        what: how messages call it.
        rows: how many there are in all.

    Raises:
        InputError: that names a row.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"x": torch.arange(4.0)}, batch_size=4)
        >>> require_of_each(lambda rows: rows["x"] > 1, batch, batch["x"] > 1, what="where=", rows=8)
    """
    flat = found.detach().reshape(len(found), -1)
    if len(flat) < 2 or not flat.shape[1]:
        return
    leading = flat[:, 0].double().nan_to_num()
    largest = largest_of(flat)
    for place in sorted({0, len(flat) - 1, int(leading.argmin()), int(leading.argmax())}):
        try:
            with warnings.catch_warnings(action="ignore"):  # a spread of a single row is none
                alone = ask(batch[place : place + 1]).detach().reshape(-1)
        except Exception as error:  # a squeeze() of a single row, say
            warn(
                f"{what} is a function that fails of a row alone ({type(error).__name__}: {error!s:.200}), so that "
                "nothing tells whether it says of a row something else when other rows are read with it"
            )
            return
        if alone.shape == flat[place].shape and not near(alone, flat[place], _OF_LARGEST, largest):
            raise InputError(
                f"{what} is a function that says of a row something else when other rows are read with it (of one "
                f"{_said(flat[place])} beside {len(flat) - 1} others, and {_said(alone)} alone), and the {rows} rows "
                f"are read {len(flat)} at a time: work out beforehand what it compares a row with (a median, a rank), "
                f"or store what it says in the rows; where it takes batch_size=, {rows} reads all of them together"
            )


def _said(values: Tensor) -> str:
    one = values[0].item()
    return f"{one:.4g}" if isinstance(one, float) else f"{one}"
