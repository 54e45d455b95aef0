"""Sums, differences and multiples of directions at one place, which are directions too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError
from tdhook_rl.latent.vectors.combining import combined


class Arithmetic:
    """The part of a steering vector that has ``+``, ``-``, ``*`` and ``/``."""

    vector: Tensor
    path: Any
    facts: Mapping[str, Any]
    shuffled: Tensor | None

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, Arithmetic):
            return NotImplemented if not finite_number(other) == 0 else self  # the start of sum()
        if (self.path, self.vector.shape) != (other.path, other.vector.shape):
            raise InputError(
                f"directions add up at one place: one is at {self.path!r} with the features "
                f"{tuple(self.vector.shape)}, the other at {other.path!r} with {tuple(other.vector.shape)}"
            )
        return self._made(
            self.vector + other.vector.to(self.vector.device),
            sum_of_shuffled(self.shuffled, other.shuffled),
            [(1.0, self.facts), (1.0, other.facts)],
        )

    __radd__ = __add__

    def __sub__(self, other: Any) -> Self:
        return self + -other if isinstance(other, Arithmetic) else NotImplemented

    def __neg__(self) -> Self:
        return self * -1.0

    def __mul__(self, factor: Any) -> Self:
        number = finite_number(factor)
        if number is None:
            if isinstance(factor, Arithmetic):
                raise InputError("a direction is multiplied by a number, not by a direction; see cosines({...})")
            raise InputError(f"a direction is multiplied by a finite number, got {factor!r:.80}")
        shuffled = None if self.shuffled is None else self.shuffled * number
        return self._made(self.vector * number, shuffled, [(number, self.facts)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        number = finite_number(divisor)
        if not number:
            raise InputError(f"a direction is divided by a finite number that is not 0, got {divisor!r:.80}")
        return self * (1 / number)

    def _made(self, vector: Tensor, shuffled: Tensor | None, parts: Sequence[tuple[float, Mapping[str, Any]]]) -> Self:
        facts = combined(parts) | {"norm": float(vector.double().norm())}
        return type(self)(vector=vector, path=self.path, facts=facts, shuffled=shuffled)  # type: ignore[call-arg]


def floats(given: Any, name: str) -> Tensor:
    """A finite tensor of floats that needs no gradient."""
    found = numbers(given, f"{name}=")
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name}= has NaN or infinite entries")
    return found


def sum_of_shuffled(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Shuffled extractions of a sum: the sums of those of its parts, as many as both have."""
    if one is None or other is None:
        return None
    count = min(len(one), len(other))
    return one[:count] + other[:count].to(one.device)


def finite_number(given: Any) -> float | None:
    """A finite number as a float; ``None`` for something else."""
    if isinstance(given, bool) or (isinstance(given, Tensor) and given.numel() != 1):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
