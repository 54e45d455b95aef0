"""What is put in the place of an activation: all of another one, some of its units, its part in a subspace.

Each is given the rows of a pass over copies of states: all states, then all states again. What belongs to a state, such
as its activation in the other run, is repeated; what belongs to a copy, such as which units are put in, differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.sites.numbers import difference, in_dtype, is_whole


class Put:
    """All of an activation; and what a module gives beside, if that is given.

    Args:
        site: where.
        values: of each run, ``(states, ...)``, or without rows, for all alike.
        beside: what the module gave beside, of each run.
    """

    def __init__(self, site: str, values: Sequence[Tensor], beside: Sequence[Sequence[Tensor]] = ()) -> None:
        self.site = site
        self.values = values
        self.beside = beside

    def of_run(self, rows: Tensor, index: int) -> Tensor:
        """What is put in, with a dimension for the copies before the rows: of one copy, where all are alike."""
        if index >= len(self.values):
            raise SiteError(
                f"the module of {self.site!r} runs more often on the states that are patched than on the others "
                f"({len(self.values)} times): name one run, as in 'act@0'"
            )
        value = self.values[index]
        if value.shape[1:] != rows.shape[1:] or not len(value) or len(rows) % len(value):
            raise InputError(
                f"{self.site!r} gives {tuple(rows.shape)} on the states that are patched, and {tuple(value.shape)} on "
                "the others: its rows do not pair up"
            )
        return value.to(rows.device)

    def __call__(self, rows: Tensor, index: int) -> Tensor:
        value = self.of_run(rows, index)
        return value if len(value) == len(rows) else value.repeat(len(rows) // len(value), *(1,) * (rows.ndim - 1))

    def others(self, index: int) -> Sequence[Tensor]:
        """What is put in the place of what the module gives beside its first tensor."""
        return self.beside[index] if index < len(self.beside) else ()


class PutUnits(Put):
    """Some units of an activation, others in each copy.

    Args:
        site: where.
        values: of each run, ``(states, ...)``.
        axis: of the units, from the end.
        units: boolean, ``(copies, units)``: which are put in.
    """

    def __init__(self, site: str, values: Sequence[Tensor], axis: int, units: Tensor) -> None:
        super().__init__(site, values)
        self.axis = axis
        self.units = units

    def __call__(self, rows: Tensor, index: int) -> Tensor:
        value = self.of_run(rows, index)
        copies = len(self.units)
        shape = [1] * rows.ndim
        shape[self.axis] = rows.shape[self.axis]
        units = self.units.to(rows.device).reshape(copies, *shape)
        apart = rows.reshape(copies, len(rows) // copies, *rows.shape[1:])
        return torch.where(units, value.to(rows.dtype)[None], apart).reshape(rows.shape)

    def others(self, index: int) -> Sequence[Tensor]:
        return ()


class PutPart(Put):
    """The part of an activation in a subspace, another one in each copy.

    Args:
        site: where.
        values: of each run, ``(states, ...)``.
        dims: the dimensions of the activation that vectors of the subspace have, from the end; the others, such as
            the places of a map, have a component each.
        basis: orthonormal, ``(copies, vectors, size)``, in the order of ``dims``.
    """

    def __init__(self, site: str, values: Sequence[Tensor], dims: Sequence[int], basis: Tensor) -> None:
        super().__init__(site, values)
        self.dims = list(dims)
        self.basis = basis

    def __call__(self, rows: Tensor, index: int) -> Tensor:
        value = self.of_run(rows, index)
        copies = len(self.basis)
        apart = rows.reshape(copies, len(rows) // copies, *rows.shape[1:])
        if is_whole(rows):  # whose differences may wrap around
            value, apart = value.double(), apart.double()
        basis = self.basis.to(apart)
        change = vectors_last(difference(value[None], apart), self.dims)
        flat = change.reshape(copies, -1, basis.shape[-1])
        part = (flat @ basis.transpose(1, 2)) @ basis
        moved = apart + vectors_back(part.reshape(change.shape), apart.shape, self.dims)
        return in_dtype(moved, rows, "an activation with another part in a subspace", self.site).reshape(rows.shape)

    def others(self, index: int) -> Sequence[Tensor]:
        return ()


def vectors_last(value: Tensor, dims: Sequence[int]) -> Tensor:
    """The same with these dimensions flattened into the last."""
    moved = value.movedim(list(dims), list(range(-len(dims), 0)))
    return moved.flatten(-len(dims))


def vectors_back(vectors: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """What :func:`vectors_last` was given, of this shape."""
    sizes = [shape[dim] for dim in dims]
    return vectors.unflatten(-1, sizes).movedim(list(range(-len(dims), 0)), list(dims))
