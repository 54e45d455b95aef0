"""What a policy from elsewhere makes of observations before its first layer, with one dimension of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdhook_rl.calls.chains import is_called_plainly, tells_of
from tdhook_rl.errors import InputError


class Part:
    """One entry of the observation: its shape, and what becomes of it.

    Args:
        shape: of the entry, without the batch.
        name: for messages.
        image: it is a picture of bytes, scaled to 0 to 1, and may come with the channels last.
        sizes: it consists of indices among so many each, which become one-hot.
        one_hot: these come as one-hot already.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        name: str = "observation",
        *,
        image: bool = False,
        sizes: tuple[int, ...] = (),
        one_hot: bool = False,
    ) -> None:
        self.shape, self.name, self.image = shape, name, image
        self.sizes, self.one_hot = sizes, one_hot
        self.given = (sum(sizes),) if one_hot else shape

    def batch_of(self, value: Tensor) -> torch.Size:
        """The batch shape of a tensor.

        Raises:
            InputError: if it does not end in the shape of the entry.
        """
        if value.shape[value.ndim - len(self.given) :] == self.given or self._channels_last(value):
            return value.shape[: value.ndim - len(self.given)]
        turned = f", or {(*self.shape[1:], self.shape[0])} with its channels last" if len(self.shape) == 3 else ""
        raise InputError(
            f"the policy was trained on {self.name!r} of shape {self.given}{turned}; the data has "
            f"{tuple(value.shape)}, batch included"
        )

    def rows(self, value: Tensor) -> Tensor:
        """The entry with its batch in one dimension, and its channels first."""
        batch = self.batch_of(value)
        if value.shape[len(batch) :] != self.given:
            value = value.movedim(-1, -3)
        return value.reshape(-1, *self.given) if self.given else value.reshape(-1)

    def prepared(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What the first layer reads, in the dtype of its weights."""
        if not self.sizes:
            return rows.to(dtype) / 255.0 if self.image else rows.to(dtype)
        if self.one_hot:
            return rows.to(dtype)
        parts = rows.reshape(len(rows), -1).long().unbind(-1)
        return torch.cat([F.one_hot(one, size) for one, size in zip(parts, self.sizes, strict=True)], -1).to(dtype)

    def _channels_last(self, value: Tensor) -> bool:
        turns = len(self.shape) == 3 and not self.sizes
        return turns and tuple(value.shape[-3:]) == (*self.shape[1:], self.shape[0])


class Observation(nn.Module):
    """Prepares all entries: a tensor of rows, or a dictionary of them where the observation is one.

    Args:
        parts: the entries by the name that the network knows; under ``""`` if there is only one, without a name.
        normalise: what is done to an entry before, by name.
    """

    writes_nothing = True

    def __init__(self, parts: Mapping[str, Part], normalise: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.normalise = nn.ModuleDict({f"of_{name}": one for name, one in (normalise or {}).items()})

    def forward(self, *values: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        found = {}
        for (name, part), value in zip(self.parts.items(), values, strict=True):
            rows = part.rows(value)
            if f"of_{name}" in self.normalise:
                rows = self.normalise[f"of_{name}"](rows)
            found[name] = part.prepared(rows, dtype)
        return found[""] if "" in found else found

    @tells_of(forward)
    def hands_on(self, value: Tensor) -> bool:
        """Whether it gives a tensor of rows as it is, to a network that has its dtype."""
        part = self.parts.get("")
        if part is None or len(self.parts) > 1 or len(self.normalise) or part.image or part.sizes or part.one_hot:
            return False
        return value.is_floating_point() and value.shape[1:] == part.shape

    def batch_of(self, *values: Tensor) -> torch.Size:
        """The batch shape, which all entries share.

        Raises:
            InputError: if one has another shape than the policy was trained on, or another batch.
        """
        batches = {part.name: part.batch_of(value) for part, value in zip(self.parts.values(), values, strict=True)}
        first = next(iter(batches.values()))
        if any(batch != first for batch in batches.values()):
            raise InputError(f"the entries of an observation have different batch shapes: {batches}")
        return first


class Rows(nn.Sequential):
    """Modules one after the other, of which the first prepares the observation, over one dimension of rows.

    What comes from other libraries knows batches of one dimension; here they may have any number, none included. The
    modules keep the names that they have where they come from.
    """

    writes_nothing = True

    #: The modules inside see exactly one dimension of rows, also where the batch has none.
    flat_rows = True

    #: How many tensors they give, where that is known.
    gives: int | None = None

    #: What they give is one number for each row, in a dimension of its own.
    column = False

    #: What they give is a vector for each row, as :class:`Features` reads it.
    vectors = False

    def forward(self, *values: Tensor) -> Any:  # type: ignore[override]
        prepare, *modules = self._modules.values()
        batch = prepare.batch_of(*values)  # type: ignore[union-attr, operator]
        x = prepare(*values, dtype=dtype_of(self))  # type: ignore[misc]
        for module in modules:
            x = module(x)  # type: ignore[misc]
        if self.gives is not None:
            require_tensors(x, self.gives)
        if self.vectors and x.ndim != 2:
            raise InputError(
                f"what actor and value share is to be a vector for each row, and the trunk gave {tuple(x.shape)}, rows "
                "included: let it end in an nn.Flatten, or take part='actor' and part='value', each by itself"
            )
        if isinstance(x, tuple):
            return tuple(unfolded(one, batch) for one in x)
        found = unfolded(x, batch)
        return found.unsqueeze(-1) if self.column and found.shape == batch else found

    @tells_of(forward)
    def runs_in_order(self, x: Tensor) -> list[nn.Module] | None:
        prepare: Any
        prepare, *modules = self._modules.values()
        kind = type(prepare)
        told = getattr(kind, "hands_on", None)
        if told is None or told.forward is not kind.forward or not is_called_plainly(prepare):
            return None
        # One dimension of rows is what the modules see; weights refuse numbers of another dtype, which it would cast.
        if x.ndim != 2 or not told(prepare, x):
            return None
        if x.dtype != torch.float32 and next(self.parameters(), None) is None:
            return None
        return modules  # type: ignore[return-value]


class Branch(nn.Module):
    """Holds one module under the name that it has in the module it was taken from, so that its path stays."""

    writes_nothing = True

    def __init__(self, **module: nn.Module) -> None:
        super().__init__()
        [(self.name, one)] = module.items()
        self.add_module(self.name, one)

    def forward(self, x: Any) -> Any:
        return self._modules[self.name](x)  # type: ignore[misc]

    @tells_of(forward)
    def runs_in_order(self, x: Tensor) -> list[nn.Module]:
        return [self._modules[self.name]]  # type: ignore[list-item]


class Through(nn.Module):
    """Calls a module by one of its methods."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *x: Any) -> Any:
        return getattr(self.module, self.method)(*x)


class Features(nn.Module):
    """Stands where :class:`Observation` would, for a network that reads features of one dimension."""

    writes_nothing = True

    def forward(self, *values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return values[0].reshape(-1, values[0].shape[-1])

    @tells_of(forward)
    def hands_on(self, value: Tensor) -> bool:
        return True

    def batch_of(self, *values: Tensor) -> torch.Size:
        return values[0].shape[:-1]


def require_tensors(found: Any, count: int) -> None:
    """Raise unless a network gave so many tensors.

    Raises:
        InputError: says what it gave.
    """
    parts = list(found) if isinstance(found, (tuple, list)) else [found]
    if len(parts) != count or not all(isinstance(one, Tensor) for one in parts) or (count > 1) is (parts == [found]):
        wanted = "one tensor" if count == 1 else f"{count} tensors, as a tuple"
        names = ", ".join(type(one).__name__ for one in parts[:4])
        got = f"a {type(found).__name__} of {len(parts)} ({names})" if isinstance(found, (tuple, list)) else names
        raise InputError(
            f"a network from elsewhere is to give {wanted}, its rows first, and it gave {got}: name a module or a "
            "method that gives this alone, without distributions, actions or states of a memory"
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """That of a module's weights, which may have been cast."""
    return next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)


def batch_without(value: Tensor, dims: int) -> torch.Size:
    """The batch shape of observations of so many dimensions.

    Raises:
        InputError: if there are fewer.
    """
    if value.ndim < dims:
        raise InputError(f"an observation has {dims} dimensions here, and what was given has {tuple(value.shape)}")
    return value.shape[: value.ndim - dims]


def unfolded(rows: Tensor, batch: torch.Size) -> Tensor:
    """Rows of one dimension in the shape of the batch."""
    if len(rows) != math.prod(batch):
        raise InputError(
            f"a network from elsewhere gave {tuple(rows.shape)} for {math.prod(batch)} rows: its first dimension is to "
            "be the rows"
        )
    return rows.reshape(*batch, *rows.shape[1:])
