"""Which rows of a batch are real: no padding, and where results are read, rows for which there are some."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry, surely_lacks
from tdhook_rl.sites.missing import missing_value

#: Where ``split_trajectories`` and collectors mark the steps that are not padding.
PADDING = (("collector", "mask"), "mask")
_SAYS_PADDING = frozenset(["collector", "mask", "masks"])
#: Up to so many entries are added up faster by Python than by torch.
FEW = 64


def real_rows(data: TensorDictBase, *keys: NestedKey) -> Tensor | None:
    """The rows of a batch that hold something, ``None`` if that is all of them.

    Padding (``("collector", "mask")``, the ``"mask"`` of ``split_trajectories``, the ``"masks"`` of ``pad_sequence``)
    does not, and neither do rows for which the mask of a result, ``("computed", root)``, is false.

    Args:
        data: a batch.
        *keys: entries that are going to be read.

    Returns:
        a boolean tensor of the batch shape.

    Example:
        >>> from tensordict import TensorDict
        >>> data = TensorDict({"cache": {"0": torch.zeros(2)}, "computed": {"cache": torch.tensor([True, False])}}, 2)
        >>> real_rows(data, ("cache", "0")), real_rows(data, "observation")
        (tensor([ True, False]), None)
    """
    if not keys and surely_lacks(data, _SAYS_PADDING):
        return None
    masks = [*(row_mask(data, key) for key in PADDING), _padded_entries(data)]
    roots = dict.fromkeys(key[0] for key in keys if isinstance(key, tuple) and len(key) > 1)
    masks += [row_mask(data, ("computed", root)) for root in roots]
    found: Tensor | None = None
    for mask in masks:
        if mask is not None:
            found = mask if found is None else found & mask.to(found.device)
    return found


def _padded_entries(data: TensorDictBase) -> Tensor | None:
    """The rows that hold an entry, by the masks that tensordict's ``pad_sequence`` writes, one for each entry."""
    masks = get_entry(data, "masks")
    if not isinstance(masks, TensorDictBase):
        return None
    rows = {key: row_mask(masks, key) for key in masks.keys(True, True)}
    if not rows or any(one is None or get_entry(data, key) is None for key, one in rows.items()):
        return None  # masks of one's own
    return torch.stack([one for one in rows.values() if one is not None]).any(0)


def row_mask(data: TensorDictBase, key: NestedKey) -> Tensor | None:
    """A boolean entry with one value for each row; ``None`` where there is no such entry."""
    value = get_entry(data, key)
    batch = data.batch_size
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape not in (batch, (*batch, 1)):
        return None
    return value.reshape(batch)


def surely_finite(value: Tensor) -> bool:
    """Whether the sum says so, which costs a tenth of looking at each entry; other devices would be waited for."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if not value.is_cpu:
        return False
    number = value.numel()
    if 1 < number <= FEW:
        return cmath.isfinite(sum(map(sum, value.tolist()) if value.ndim == 2 else value.reshape(-1).tolist()))
    return cmath.isfinite((value if number == 1 else value.sum()).item())


def defined_values(values: Iterable[Tensor], batch: torch.Size, infinite: bool = False) -> Tensor | None:
    """The rows in which every value is a number, ``None`` if that is surely all; integers always are.

    Args:
        values: tensors with the batch shape first.
        infinite: whether infinite values count as numbers (the logits of masked actions are infinite).
    """
    rows: Tensor | None = None
    for value in values:
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.detach()
        odd = value != value if infinite else value - value != 0  # times 0 is 0 to a compiler, whatever the value
        odd = odd.flatten(len(batch)).any(-1) if value.ndim > len(batch) else odd
        rows = ~odd if rows is None else rows & ~odd
    return rows


def reached_values(values: Sequence[Tensor], traced: bool = False) -> Sequence[Tensor]:
    """The attributions of one root without those that are NaN in every row: no gradient reaches them, they judge none.

    Where all of them are, no row has one. Where ``traced``, numbers cannot be looked at: zeros stand for what is left.
    """
    if traced:
        empty = torch.stack([(value != value).all() for value in values])
        return [torch.where(one & ~empty.all(), 0, value) for one, value in zip(empty, values, strict=True)]
    found = [value for value in values if value.is_meta or surely_finite(value) or not bool((value != value).all())]
    return found or values


def without_other_rows(values: Mapping[tuple[str, ...], Tensor], rows: Tensor) -> dict[tuple[str, ...], Tensor]:
    """The values of the given rows, and :func:`missing_value` in the others."""
    filled = {}
    for key, value in values.items():
        mask = rows.reshape((*rows.shape, *(1,) * (value.ndim - rows.ndim)))
        filled[key] = torch.where(mask, value, torch.full_like(value, missing_value(value.dtype)))
    return filled
