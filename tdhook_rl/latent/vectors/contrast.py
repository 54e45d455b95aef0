"""A direction from a buffer of which some rows have a concept and others do not: read for labels, then for sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError, listed, warn
from tdhook_rl.latent.vectors.activations import reading
from tdhook_rl.latent.vectors.dealing import Dealer, check_dealing
from tdhook_rl.latent.vectors.extracted import ContrastSums, Extracted
from tdhook_rl.latent.vectors.origins import DataDigest
from tdhook_rl.latent.vectors.pairs import add_inputs

#: Which rows count as what.
Where = Callable[[TensorDictBase], Any] | str | tuple[str, ...]
#: Labels that are counted one by one.
_COUNTED = 1000


def contrast(
    policy: nn.Module,
    place: Any,
    data: Any,
    where: Where,
    *,
    positive: float,
    negative: float | None,
    shuffles: int,
    seed: int,
    batch_size: int | None,
) -> Extracted:
    """The mean activation of positive rows minus that of negative ones; see ``SteeringVector.from_contrast``."""
    from tdhook_rl.reading.reader import Reader  # imports TorchRL's collectors

    check_dealing(shuffles, seed)
    if positive == negative:
        raise InputError(f"positive= and negative= name one class, {positive!r}: a direction leads from one to another")
    labelled = _Labelled(Reader(data), where, positive, negative, batch_size)
    counted, numbers = Counter[float](), Counter[str]()
    for _, side, labels in labelled.parts():
        for value, rows in zip(*labels[~labels.isnan()].unique(return_counts=True), strict=True):
            if float(value) in counted or len(counted) < _COUNTED:
                counted[float(value)] += int(rows)
        numbers.update({"positive": int((side == 1).sum()), "negative": int((side == 0).sum()), "all": len(side)})
    if not numbers["positive"] or not numbers["negative"]:
        raise InputError(labelled.words(counted, numbers))
    return _summed(policy, place, labelled, numbers, shuffles, seed)


def _summed(
    policy: nn.Module, place: Any, labelled: _Labelled, numbers: Counter[str], shuffles: int, seed: int
) -> Extracted:
    chosen = numbers["positive"] + numbers["negative"]
    dealer = Dealer(draws=shuffles, positive=numbers["positive"], rows=chosen, seed=seed)
    sums, digest, lacking, seen = ContrastSums(), DataDigest(), 0, 0
    with reading(policy, place) as site:
        for rows, side, _ in labelled.parts():
            which = (side >= 0).nonzero().flatten()
            seen += int((side == 1).sum())
            if len(which) < len(rows):
                rows, side = rows[which.to(rows.device or "cpu")], side[which]
            first = 0
            for piece, values, usable in site.pieces(rows):
                here = side[first : first + len(piece)] == 1
                first += len(piece)
                add_inputs(digest, "rows", piece, site)
                digest.add("side", here)
                dealt = dealer.next(len(piece))
                if not bool(usable.all()):
                    kept = usable.cpu()
                    lacking += int((~kept).sum())
                    values, here, dealt = values[usable], here[kept], dealt[:, kept]
                if len(values):
                    sums.add(values, here, dealt)
        name = site.name
    counts = sums.counts()
    if seen != numbers["positive"] or sum(counts) + lacking != chosen:
        raise InputError(
            f"where= gave other labels the second time ({seen} positive rows, and {numbers['positive']} before): it is "
            "asked twice, and its answer may depend on nothing but the rows"
        )
    if not all(counts):
        raise InputError(
            f"the activations of {name!r} are finite in {counts[0]} positive and {counts[1]} negative rows, of "
            f"{numbers['positive']} and {numbers['negative']}: there is no difference of means"
        )
    if lacking:
        warn(f"{lacking} of {chosen} rows are left out: the activation of {name!r} is not finite there")
    found = sums.found()
    found.facts = {
        "source": "contrast", "where": labelled.name, "positive": labelled.positive, "negative": labelled.negative,
        "positive_rows": counts[0], "negative_rows": counts[1], "not_finite_rows": lacking,
        "other_rows": numbers["all"] - chosen, "data": digest.hexdigest(),
    }  # fmt: skip
    return found


class _Labelled:
    """Rows with the side that each is on: 1 positive, 0 negative, -1 neither."""

    def __init__(
        self, reader: Any, where: Where, positive: float, negative: float | None, batch_size: int | None
    ) -> None:
        self._reader, self._where = reader, where
        self.positive, self.negative = positive, "others" if negative is None else negative
        self._batch_size = reader.batch_size() if batch_size is None else batch_size
        key = where if isinstance(where, str) else ".".join(where) if isinstance(where, tuple) else None
        self.name = key or getattr(where, "__qualname__", type(where).__name__)

    def parts(self) -> Iterator[tuple[TensorDictBase, Tensor, Tensor]]:
        """Real rows with their sides, and the labels that these come from, ``(rows,)``."""
        for first, last in self._reader.chunks(self._batch_size):
            index = torch.arange(first, last)
            batch = self._reader.read(index)
            labels = self._labels(batch)
            flat = batch if batch.ndim == 1 else batch.flatten(0, -1)
            real = real_rows(batch)
            kept = torch.ones(len(flat), dtype=torch.bool) if real is None else real.reshape(-1).cpu()
            kept &= ~self._reader.incomplete(index).repeat_interleave(len(flat) // len(index))
            side = torch.full_like(labels, -1, dtype=torch.int8)
            others = labels == labels if self.negative == "others" else labels == self.negative
            side[others] = 0  # NaN is no label
            side[labels == self.positive] = 1
            if not bool(kept.all()):
                flat, side, labels = flat[kept.to(flat.device or "cpu")], side[kept], labels[kept]
            yield flat, side, labels

    def words(self, counted: Counter[float], numbers: Counter[str]) -> str:
        """Why there are no two classes."""
        there = listed((f"{value:g} ({rows} rows)" for value, rows in sorted(counted.items())), 8) or "none"
        wanted = "any other label" if self.negative == "others" else f"the label {self.negative:g}"
        return (
            f"a direction leads from one class to another: {numbers['positive']} rows have the label "
            f"{self.positive:g} (positive=) and {numbers['negative']} have {wanted} (negative=); the labels of "
            f"{self.name!r} are {there}"
        )

    def _labels(self, batch: TensorDictBase) -> Tensor:
        if callable(self._where):
            found = self._where(batch)
        else:
            found = required(batch, self._where, "SteeringVector.from_contrast reads the label")
        try:
            found = torch.as_tensor(found).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"where={self.name!r} gives {type(found).__name__}, no numbers or truth values") from None
        shape = batch.batch_size
        if found.shape not in (shape, torch.Size((*shape, 1))) or found.is_complex():
            raise InputError(
                f"where={self.name!r} gives {tuple(found.shape)} ({found.dtype}), where a label for each row of the "
                f"batch {tuple(shape)} is taken"
            )
        return found.reshape(-1).double()
