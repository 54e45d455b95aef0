"""Tensors that the user gives as numbers: dense, with data, and real; and numbers of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.arguments.checked import shown
from tdhook_rl.arguments.dense import require_dense
from tdhook_rl.errors import InputError


def numbers(given: Any, what: str, *, imaginary: bool = False, beside: str = "") -> Tensor:
    """What is given as a dense tensor of numbers, without a graph.

    Args:
        given: a tensor, an array, numbers in lists, or a number.
        what: what messages call it.
        imaginary: whether complex numbers will do.
        beside: what else it may be, for the message.

    Raises:
        InputError: for anything else, and for tensors without numbers to compute with as they are.

    Example:
        >>> numbers([1, 2], "the vector")
        tensor([1, 2])
        >>> try:
        ...     numbers(torch.eye(2).to_sparse(), "the vector")
        ... except InputError as error:
        ...     print(error)
        the vector is a dense tensor, got a sparse one (torch.sparse_coo): give it as .to_dense()
    """
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what} is a tensor of numbers{beside}, got {shown(given)}") from None
    require_dense(tensor, what)
    if tensor.is_complex() and not imaginary:
        raise InputError(f"{what} is of real numbers, got {tensor.dtype}")
    # Floats of 8 bits are for storage: hardly anything can be computed in them.
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() and tensor.itemsize < 2 else tensor


def plain_number(value: Any) -> Any:
    """A number of NumPy as Python's own; anything else as it is.

    Example:
        >>> import numpy
        >>> plain_number(numpy.int64(3)), plain_number("all")
        (3, 'all')
    """
    return value.item() if isinstance(value, np.generic) else value
