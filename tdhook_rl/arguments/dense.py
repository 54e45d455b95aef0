"""Tensors that hold a number at each place of their shape, and those of another make."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_rl.errors import InputError


def require_dense(tensor: Tensor, what: str) -> None:
    """Refuse a tensor without numbers to compute with as they are: nested, sparse, without data, quantised.

    Args:
        tensor: what was given.
        what: what messages call it.

    Raises:
        InputError: that says what to give.

    Example:
        >>> try:
        ...     require_dense(torch.eye(2).to_sparse(), "the vector")
        ... except InputError as error:
        ...     print(error)
        the vector is a dense tensor, got a sparse one (torch.sparse_coo): give it as .to_dense()
    """
    if tensor.is_nested:
        raise InputError(f"{what} is a dense tensor, got a nested one: give one of its parts")
    if tensor.layout is not torch.strided:
        raise InputError(f"{what} is a dense tensor, got a sparse one ({tensor.layout}): give it as .to_dense()")
    if tensor.is_meta:
        raise InputError(f"{what} holds no numbers: it is on the device 'meta'. Give it with its data")
    if tensor.is_quantized:
        raise InputError(f"{what} is of real numbers, got {tensor.dtype}: give it as .dequantize()")
