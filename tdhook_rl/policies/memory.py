"""Tensors and arrays that are views of one memory: what is written through one is read through the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Where NumPy has it before its version 2, and since.
_byte_bounds = getattr(np, "byte_bounds", None) or np.lib.array_utils.byte_bounds


def share_memory(
    arrays: Sequence[np.ndarray], tensors: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> list[Any]:
    """Those arrays whose memory another array or a tensor has a part of, and those tensors; and views of parameters.

    Tensors that share memory among themselves only are left out: a copy by way of their storage keeps that.
    """
    spans = [(*_byte_bounds(one), one) for one in arrays if one.size]
    spans += [(*span, one) for one in (*tensors, *parameters) if (span := _span(one)) is not None]
    found: list[Any] = []
    group: list[Any] = []
    end = -1
    for low, high, one in sorted(spans, key=lambda span: span[0]):
        if low >= end:
            found += _anchored(group)
            group = []
        group.append(one)
        end = max(end, high)
    found += _anchored(group)
    own = {id(one) for one in parameters}
    return [one for one in found if id(one) not in own]


def _anchored(group: list[Any]) -> list[Any]:
    """A group in which something is written where it is, and never replaced by a copy."""
    anchors = any(isinstance(one, np.ndarray) or one.requires_grad for one in group)
    return group if len(group) > 1 and anchors else []


def memory_of(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 where it has none (in a transform, some layouts, on meta)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _span(tensor: Tensor) -> tuple[int, int] | None:
    start = memory_of(tensor)
    return (start, start + tensor.untyped_storage().nbytes()) if start else None


def read_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def write_tensor(tensor: Tensor, content: Tensor) -> None:
    """In place, as the array's side is written: past autograd's count of versions."""
    tensor.data.copy_(content)


def same_values(now: Any, then: Any) -> bool:
    """Whether two tensors, or TensorDicts, hold the same numbers; NaN is the same as NaN."""
    if not isinstance(now, Tensor):
        return all(same_values(value, then.get(key)) for key, value in now.items(True, True))
    if not is_dense(now):
        one, other = dense_parts(now), dense_parts(then)
        return len(one) == len(other) and all(map(same_values, one, other))
    if now.shape != then.shape or now.is_meta:  # which has no numbers
        return now.shape == then.shape
    return torch.equal(now, then) or bool(((now == then) | ((now != now) & (then != then))).all())


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is neither nested nor sparse."""
    return tensor.layout is torch.strided and not tensor.is_nested


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """What a nested or a sparse tensor, such as the edges of a graph, consists of."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense() if tensor.layout is not torch.strided else tensor]
