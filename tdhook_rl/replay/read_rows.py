"""Which rows an analysis has read: sums of their bits by place, the same in whatever chunks and order they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.reading.going_on import row_numbers

#: By the name of an entry the sum of its rows.
Sums = Mapping[str, int]
_ALL = (1 << 64) - 1


def keys_read(hooked: Any, transforms: Sequence[Any]) -> list[NestedKey]:
    """The entries of which results are: what the policy or a transform of the buffer reads, and what it has put out."""
    of_transforms = [key for one in transforms for key in getattr(one, "in_keys", None) or ()]
    return list(dict.fromkeys([*hooked.policy_in_keys, *hooked.policy_out_keys, *of_transforms]))


def sums_of(places: Tensor, rows: TensorDictBase, keys: Sequence[NestedKey]) -> Sums:
    """Of each of these entries a sum of its rows' bits and of where they are.

    Args:
        places: ``(rows,)``, among those that are analysed.
        rows: ``(rows, ...)``.
        keys: of entries; one that is not there has no sum, and one that is a TensorDict one for each of its own.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"x": torch.tensor([1.0, 2.0, 3.0])}, batch_size=3)
        >>> places = torch.arange(3)
        >>> parts = [sums_of(places[part], rows[part], ["x"]) for part in (slice(0, 1), slice(1, 3))]
        >>> together(*parts) == sums_of(places, rows, ["x"]), sums_of(places.flip(0), rows, ["x"]) == parts[0]
        (True, False)
    """
    found = {}
    for name, value in _entries(rows, keys):
        mixed = row_numbers(value.detach().reshape(len(rows), -1)) ^ _mixed(places + 1)
        found[name] = int(_mixed(mixed).sum()) & _ALL
    return found


def together(one: Sums, other: Sums) -> Sums:
    """The sums of both."""
    return {name: (one.get(name, 0) + other.get(name, 0)) & _ALL for name in {**one, **other}}


def differing(one: Sums, other: Sums) -> list[str]:
    """The entries that both have, and that are not of the same rows."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def _entries(rows: TensorDictBase, keys: Sequence[NestedKey]) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        value = rows.get(key, None)
        if isinstance(value, TensorDictBase):
            inner = [(*key_parts(key), *key_parts(one)) for one in value.keys(True, True)]
            yield from _entries(rows, inner)
        elif isinstance(value, Tensor) and not value.is_nested:
            yield ".".join(key_parts(key)), value


def _mixed(numbers: Tensor) -> Tensor:
    """A fixed mixing of 64 bits, so that sums of other rows in other places are others."""
    numbers = (numbers ^ (numbers >> 31)) * 0x2545F4914F6CDD1D
    numbers = (numbers ^ (numbers >> 29)) * 0x27D4EB2F165667C5
    return numbers ^ (numbers >> 32)
