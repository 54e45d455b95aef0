"""Digests of tensors: the same numbers, to the last bit, on whatever device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its entries."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview((flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)).numpy())


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of tensors with their names, shapes and types, in whatever order they come.

    Example:
        >>> one, other = ("a", torch.zeros(2)), ("b", torch.ones(2))
        >>> digest_of([one, other]) == digest_of([other, one]), digest_of([one]) == digest_of([("b", one[1])])
        (True, False)
    """
    summed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        summed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:  # which stands for others, and has no content
            summed.update(content_of(tensor))
    return summed.hexdigest()
