"""Distributions of policies from elsewhere: their divergence is the closed one, their density that of their samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import distributions as D

from tdhook_rl.adapters.distributions import Bits, DiagonalNormal, MultiCategorical, SquashedNormal
from tdhook_rl.errors import InputError
from tdhook_rl.metrics import policy_divergence

SIZES = (2, 3)


def normal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    (mean, scale), (there, wide) = one, other
    return ((wide / scale).log() + (scale**2 + (mean - there) ** 2) / (2 * wide**2) - 0.5).sum(-1)


def choices(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], sizes: tuple[int, ...]) -> Tensor:
    parts = zip(one[0].split(sizes, -1), other[0].split(sizes, -1), strict=True)
    return sum((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for a, b in parts)  # type: ignore[return-value]


def bits(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    p, q = one[0].sigmoid(), other[0].sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)


Parameters = tuple[Tensor, Tensor]
KINDS: dict[str, tuple[Callable[..., D.Distribution], Callable[[Parameters, Parameters], Tensor]]] = {
    "normal": (lambda a, b: DiagonalNormal(a, b), normal),
    "squashed": (lambda a, b: SquashedNormal(a, b), normal),
    "squashed, wide": (lambda a, b: SquashedNormal(a, b, width=torch.tensor([2.0, 1.0, 0.5, 1.0, 3.0])), normal),
    "several": (lambda a, b: MultiCategorical(a, SIZES), lambda one, other: choices(one, other, SIZES)),
    "one of several": (lambda a, b: MultiCategorical(a, (5,)), lambda one, other: choices(one, other, (5,))),
    "bits": (lambda a, b: Bits(a), bits),
}


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("batch", [(4,), (4, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_in_closed_form(kind: str, batch: tuple[int, ...], scale: float) -> None:
    make, by_hand = KINDS[kind]
    one, other = (
        (scale * torch.randn(*batch, 5, dtype=torch.float64), 0.2 + torch.rand(*batch, 5, dtype=torch.float64))
        for _ in range(2)
    )
    found = policy_divergence(make(*one), make(*other))
    expected = by_hand(one, other).reshape(len(found.values), -1).sum(-1)
    assert found.samples == 0
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-9)


def test_choices_among_others_have_none() -> None:
    logits = torch.randn(4, 5)
    with pytest.raises(InputError, match=r"among \(2, 3\), the other among \(3, 2\)"):
        policy_divergence(MultiCategorical(logits, (2, 3)), MultiCategorical(logits, (3, 2)))
