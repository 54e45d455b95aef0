"""Rows of a source with the side of a contrast that each is on, and the group that it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.keys import required
from tdhook_rl.arguments.of_rows import require_of_each
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError, listed

#: What a row is: a function of a batch, or a key.
Asked = Callable[[TensorDictBase], Any] | str | tuple[str, ...]
#: Labels that are counted one by one.
_COUNTED = 1000


class Part(NamedTuple):
    """Some real rows.

    Attributes:
        rows: flat.
        side: ``(rows,)``: 1 positive, 0 negative, -1 neither.
        labels: ``(rows,)``, float64.
        groups: ``(rows,)``, int64; ``None`` where none were named.
    """

    rows: TensorDictBase
    side: Tensor
    labels: Tensor
    groups: Tensor | None

    def at(self, which: Tensor) -> Part:
        """Some of them, by a mask."""
        if bool(which.all()):
            return self
        groups = None if self.groups is None else self.groups[which]
        return Part(self.rows[which.to(self.rows.device or "cpu")], self.side[which], self.labels[which], groups)

    def on_a_side(self) -> Part:
        """Those that are positive or negative."""
        return self.at(self.side >= 0)


class Labelled:
    """Reads parts of a source.

    Args:
        reader: of the rows.
        where: what says the label of a row.
        positive, negative: the labels of the two sides; ``None`` for any other.
        groups: what says the group of a row, if anything does.
        batch_size: rows of a part.
    """

    def __init__(
        self,
        reader: Any,
        where: Asked,
        positive: float,
        negative: float | None,
        groups: Asked | None,
        batch_size: int | None,
    ) -> None:
        self._reader, self._where, self._groups = reader, where, groups
        self.positive, self.negative = positive, "others" if negative is None else negative
        self._batch_size = reader.batch_size() if batch_size is None else batch_size
        self._several = 0  # of how many entries those that are read now are some
        self.name, self.groups = _name(where), None if groups is None else _name(groups)

    def parts(self) -> Iterator[Part]:
        """All real rows, in order."""
        for first, last in self._reader.chunks(self._batch_size):
            index = torch.arange(first, last)
            batch = self._reader.read(index)
            self._several = self._reader.size if last - first < self._reader.size else 0
            labels = self._said(self._where, batch, f"where={self.name!r}", "a label").double()
            flat = batch if batch.ndim == 1 else batch.flatten(0, -1)
            real = real_rows(batch)
            kept = torch.ones(len(flat), dtype=torch.bool) if real is None else real.reshape(-1).cpu()
            kept &= ~self._reader.incomplete(index).repeat_interleave(len(flat) // len(index))
            side = torch.full_like(labels, -1, dtype=torch.int8)
            others = labels == labels if self.negative == "others" else labels == self.negative
            side[others] = 0  # NaN is no label
            side[labels == self.positive] = 1
            yield Part(flat, side, labels, self._groups_of(batch)).at(kept)

    def counted(self) -> tuple[Counter[str], Counter[int]]:
        """How many rows are ``positive``, ``negative``, and there at all; how many of the two sides each group has.

        Raises:
            InputError: unless both sides have rows.
        """
        of_label, numbers, of_group = Counter[float](), Counter[str](), Counter[int]()
        for part in self.parts():
            for value, rows in _counts(part.labels[~part.labels.isnan()]):
                if value in of_label or len(of_label) < _COUNTED:
                    of_label[value] += rows
            sides = {"positive": int((part.side == 1).sum()), "negative": int((part.side == 0).sum())}
            numbers.update(sides | {"all": len(part.side)})
            if part.groups is not None:
                of_group.update(dict(_counts(part.groups[part.side >= 0])))
        if numbers["positive"] and numbers["negative"]:
            return numbers, of_group
        there = listed((f"{value:g} ({rows} rows)" for value, rows in sorted(of_label.items())), 8) or "none"
        wanted = "any other label" if self.negative == "others" else f"the label {self.negative:g}"
        raise InputError(
            f"a direction leads from one class to another: {numbers['positive']} rows have the label "
            f"{self.positive:g} (positive=) and {numbers['negative']} have {wanted} (negative=); the labels of "
            f"{self.name!r} are {there}"
        )

    def _groups_of(self, batch: TensorDictBase) -> Tensor | None:
        if self._groups is None:
            return None
        found = self._said(self._groups, batch, f"groups={self.groups!r}", "a number")
        if found.is_floating_point():
            raise InputError(f"groups={self.groups!r} gives {found.dtype}, where groups are whole numbers")
        return found.long()

    def _said(self, says: Asked, batch: TensorDictBase, argument: str, what: str) -> Tensor:
        """What is said of each row, which of some rows is what would be said of them alone."""
        found = _read(says, batch, argument, what)
        if callable(says) and self._several:
            require_of_each(
                lambda part: _read(says, part, argument, what), batch, found.reshape(len(batch), -1),
                what=f"{argument} of from_contrast", rows=self._several,
            )  # fmt: skip
        return found


def _name(asked: Asked) -> str:
    if isinstance(asked, str | tuple):
        return asked if isinstance(asked, str) else ".".join(asked)
    return str(getattr(asked, "__qualname__", type(asked).__name__))


def _read(says: Asked, batch: TensorDictBase, argument: str, what: str) -> Tensor:
    """What is said of each row, ``(rows,)``, on the CPU."""
    if isinstance(says, tuple | list) and not says:
        raise InputError(f"{argument} is a key, or a function of a batch: it is empty")
    reader = f"{argument} of from_contrast"
    found = (
        asked(says, batch, what=reader, reads_only=True) if callable(says) else required(batch, says, f"{reader} reads")
    )
    try:
        found = torch.as_tensor(found).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{argument} gives {type(found).__name__}, no numbers or truth values") from None
    shape = batch.batch_size
    if found.shape not in (shape, torch.Size((*shape, 1))) or found.is_complex():
        raise InputError(
            f"{argument} gives {tuple(found.shape)} ({found.dtype}), where {what} for each row of the batch "
            f"{tuple(shape)} is taken"
        )
    return found.reshape(-1)


def _counts(values: Tensor) -> list[tuple[Any, int]]:
    found, rows = values.unique(return_counts=True)
    return list(zip(found.tolist(), rows.tolist(), strict=True))
