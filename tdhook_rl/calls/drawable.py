"""What a distribution can have drawn: whether a stored action is such, and the dtype in which it has a probability."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import TargetError
from tdhook_rl.sites.runtime import vmap_level

#: By how much of its range a number may lie outside: it may have been stored in half precision.
ROUNDING = 1e-3


class Support(NamedTuple):
    """The numbers from ``low`` to ``high``, or the whole ones among them."""

    low: Any
    high: Any
    whole: bool = False

    def lacks(self, value: Tensor) -> Tensor:
        """Where numbers are none of these. What is no number at all is not asked about."""
        loose = 0 if self.whole else (self.high - self.low) * ROUNDING
        found = (value < self.low - loose) | (value > self.high + loose)
        fractions = self.whole and value.is_floating_point()
        return found | (value != value.round()) & value.isfinite() if fractions else found

    def said(self, place: tuple[int, ...]) -> str:
        """In words, for the number at a place, which is counted from the last dimension."""
        low, high = (_at(one, place) for one in (self.low, self.high))
        if self.whole and (low, high) == (0, 1):
            return "0 or 1"
        return f"{'whole numbers ' if self.whole else ''}between {low:g} and {high:g}"


def support_of(distribution: D.Distribution) -> Support | None:
    """The numbers that a distribution draws in each entry; ``None`` where all may be, or where it does not say."""
    bounded = next((one for one in _layers(distribution) if isinstance(one, _between_low_and_high())), None)
    if bounded is not None:  # TorchRL's do not say so in public
        return Support(bounded.low, bounded.high)  # type: ignore[attr-defined]
    try:
        found: Any = distribution.support
    except Exception:  # a property of somebody's class
        return None
    while isinstance(found, constraints.independent):
        found = found.base_constraint
    if isinstance(found, type(constraints.boolean)):
        return Support(0, 1, whole=True)
    if isinstance(found, constraints.integer_interval):
        return Support(found.lower_bound, found.upper_bound, whole=True)
    return Support(found.lower_bound, found.upper_bound) if isinstance(found, constraints.interval) else None


def as_drawn(distribution: D.Distribution, action: Tensor) -> Tensor:
    """A stored action as the distribution takes it: bits are stored in any dtype, and it takes them as floats only."""
    if not action.is_floating_point() and isinstance(last := [*_layers(distribution)][-1], D.Bernoulli):
        return action.to(last.mean.dtype)
    return action


def within(value: Tensor, low: float, high: float) -> bool:
    """Whether no number lies outside, or hardly."""
    if not value.numel():
        return True
    least, most = value.detach().aminmax()
    loose = (high - low) * ROUNDING
    return not (least.item() < low - loose or most.item() > high + loose)


def require_entries(
    stored: TensorDictBase, action: Tensor, wrong: Tensor, key: NestedKey, said: Callable[[tuple[int, ...]], str]
) -> None:
    """Refuse a stored action with wrong entries, in rows that are no padding.

    Args:
        stored: where it is stored.
        action: what is stored.
        wrong: where it is none that can have been drawn, in its shape, or with one entry for all of the last dimension.
        key: what the action is called.
        said: of a place what is drawn there.

    Raises:
        TargetError: says what stands in the first of them.
    """
    if torch.compiler.is_compiling() or vmap_level() >= 0 or not bool(wrong.any()):
        return
    real = real_rows(stored)
    if real is not None:
        wrong = wrong & real.reshape(*real.shape, *(1,) * (wrong.ndim - real.ndim))
        if not bool(wrong.any()):
            return
    place = tuple(wrong.nonzero()[0].tolist())
    found = action[place if action.shape == wrong.shape else place[:-1]].tolist()
    raise TargetError(
        f"the stored action {key!r} is {found} at {list(place)}, and what the policy draws there is {said(place)}: it "
        "is another policy's, in other units, or has noise on top. Store what was drawn, or choose another "
        "target"
    )


def _layers(distribution: Any) -> Iterator[D.Distribution]:
    while isinstance(distribution, D.Independent) and not isinstance(distribution, _between_low_and_high()):
        yield distribution
        distribution = distribution.base_dist
    yield distribution


@functools.cache
def _between_low_and_high() -> tuple[type, ...]:
    from torchrl.modules import TanhNormal, TruncatedNormal

    return TanhNormal, TruncatedNormal


def _at(bound: Any, place: tuple[int, ...]) -> float:
    if not isinstance(bound, Tensor):
        return float(bound)
    last = place[len(place) - bound.ndim :]
    return float(bound.detach()[tuple(0 if size == 1 else one for one, size in zip(last, bound.shape, strict=True))])
