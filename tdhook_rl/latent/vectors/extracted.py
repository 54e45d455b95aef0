"""Differences of means from sums: of states of two classes, and of pairs, beside what chance makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import InputError

#: A direction that is alike to this cosine is the same one.
_SAME = 0.99
#: What :func:`chance_score` is, in words.
SCORE = "the norm, over the mean norm of its shuffled extractions (1: chance)"


@dataclass
class Extracted:
    """A direction as it was found.

    Attributes:
        vector: ``(*features)``, of the type of the activations.
        shuffled: ``(k, *features)``, or ``None``.
        facts: how it was found.
    """

    vector: Tensor
    shuffled: Tensor | None
    facts: dict[str, Any] = field(default_factory=dict)


class ContrastSums:
    """Sums of activations by class, and by each of several labellings that were dealt out by chance; in float64."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, values: Tensor, positive: Tensor, dealt: Tensor) -> None:
        """Add rows.

        Args:
            values: ``(rows, *features)``, finite.
            positive: ``(rows,)``, bool.
            dealt: ``(draws, rows)``, bool.
        """
        self._like = values[0]
        rows = _double(values)
        sides = torch.cat([positive[None].to(dealt.device), dealt]).to(rows)
        if self._total is None:
            self._rows = 0
            self._total = torch.zeros_like(rows[0])
            self._sides = rows.new_zeros(len(sides), rows.shape[1])
            self._counts = rows.new_zeros(len(sides))
        self._rows += len(rows)
        self._total += rows.sum(0)
        self._sides += sides @ rows
        self._counts += sides.sum(1)

    def counts(self) -> tuple[int, int]:
        """The positive rows, and the negative ones."""
        if self._total is None:
            return 0, 0
        return int(self._counts[0]), self._rows - int(self._counts[0])

    def found(self) -> Extracted:
        """The difference of the means; of shuffled labels that leave one side empty there is none."""
        assert self._total is not None
        counts = self._counts[:, None]
        apart = self._sides / counts - (self._total - self._sides) / (self._rows - counts)
        both = (self._counts > 0) & (self._counts < self._rows)
        return _extracted(apart[0], apart[1:][both[1:]], self._like)


class PairSums:
    """Sums of the differences of pairs, and of these with signs that were drawn by chance; in float64."""

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._sums: Tensor | None = None
        self._pairs = 0

    def add(self, positive: Tensor, negative: Tensor, signs: Tensor) -> None:
        """Add pairs.

        Args:
            positive, negative: ``(pairs, *features)``.
            signs: ``(draws, pairs)``.
        """
        self._like = positive[0]
        apart = _double(positive) - _double(negative).to(_double(positive).device)
        weights = torch.cat([torch.ones(1, len(apart)), signs]).to(apart)
        found = weights @ apart
        self._sums = found if self._sums is None else self._sums + found
        self._pairs += len(apart)

    def found(self) -> Extracted:
        """The mean difference."""
        assert self._sums is not None
        mean = self._sums / self._pairs
        return _extracted(mean[0], mean[1:], self._like)


def chance_score(vector: Tensor, shuffled: Tensor | None) -> dict[str, Any]:
    """How many times as long a direction is as those that shuffled labels give, as facts; none where these are zero.

    Example:
        >>> chance_score(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))["score"]
        2.5
    """
    by_chance = 0.0 if shuffled is None else float(shuffled.double().flatten(1).norm(dim=1).mean())
    if shuffled is None or by_chance == 0:
        return {}
    alike = _cosines(vector, shuffled)
    return {
        "score": float(vector.double().norm()) / by_chance,
        "score_is": SCORE,
        **({} if alike is None else {"shuffled_cosine": float(alike.mean())}),
    }


def as_long_as(vector: Tensor, shuffled: Tensor) -> Tensor:
    """Shuffled extractions at the norm of the vector.

    Raises:
        InputError: if one is zero, or all are the vector itself, up to their length.
    """
    norms = shuffled.double().flatten(1).norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError("what shuffled labels give is zero: all the states that it is extracted from are alike")
    alike = _cosines(vector, shuffled)
    if alike is not None and len(alike) and float(alike.min()) > _SAME:
        raise InputError(
            f"what shuffled labels give is the direction itself (cosines from {float(alike.min()):.3f} on): the pairs "
            "differ in one direction alone, and means of their differences with any signs lie in it. At the norm of "
            "the vector they are no control: use random_like, or shuffled as long as they are"
        )
    scaled = shuffled.double() / norms.reshape(-1, *(1,) * vector.ndim) * vector.double().norm()
    return scaled.to(vector)


def _cosines(vector: Tensor, shuffled: Tensor) -> Tensor | None:
    """The sizes of the cosines of a vector and its shuffled extractions; ``None`` if one of them is zero."""
    unit, rows = vector.double().flatten(), shuffled.double().flatten(1)
    norms = unit.norm() * rows.norm(dim=1)
    return (rows @ unit / norms).abs() if bool((norms > 0).all()) else None


def _double(values: Tensor) -> Tensor:
    """``(rows, features)`` in float64, on the CPU where the device has none."""
    flat = values.flatten(1)
    return (flat.cpu() if flat.device.type == "mps" else flat).double()


def _extracted(vector: Tensor, shuffled: Tensor, like: Tensor) -> Extracted:
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    made = [one.reshape(*one.shape[:-1], *like.shape).to(like.device, dtype) for one in (vector, shuffled)]
    if not bool(torch.isfinite(made[0]).all()):
        raise InputError(f"the difference of the means is beyond the largest number of {dtype}")
    return Extracted(made[0], made[1] if len(made[1]) else None)
