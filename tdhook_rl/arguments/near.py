"""Whether numbers are the same but for rounding: layers and sums compute other last bits for other batches."""

from __future__ import annotations

import torch
from torch import Tensor

#: What a number may differ by, of its size.
RELATIVE = 1e-3


def largest_of(values: Tensor) -> float:
    """The largest absolute value that is finite; 0 where there is none.

    Example:
        >>> largest_of(torch.tensor([1.0, -3.0, float("inf")])), largest_of(torch.ones(0))
        (3.0, 0.0)
    """
    sizes = values.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
    return float(sizes.max()) if sizes.numel() else 0.0


def near(found: Tensor, known: Tensor, of_largest: float, largest: float | None = None) -> bool:
    """Whether numbers are the known ones but for rounding: relative to each, or to so much of the largest.

    Args:
        found, known: of one shape and dtype, or they are not near; what is no float is equal.
        of_largest: how much of the largest.
        largest: of those among which they are; of the known ones unless given.

    Example:
        >>> one = torch.tensor([1.0, 0.0])
        >>> near(one + 1e-6, one, 1e-5), near(one + 1e-2, one, 1e-5), near(one.double(), one, 1.0)
        (True, False, False)
    """
    found, known = found.detach().cpu(), known.detach().cpu()
    if found.shape != known.shape or found.dtype != known.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, known)
    largest = largest_of(known) if largest is None else largest
    room = 16 * torch.finfo(found.dtype).eps
    return torch.allclose(
        found.double(), known.double(), rtol=max(room, RELATIVE), atol=max(room, of_largest) * largest, equal_nan=True
    )
