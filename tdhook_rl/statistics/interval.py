"""An estimate and how sure it is, and the two ways from a variance by group to its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tdhook_rl.errors import InputError

#: Below so many groups nothing is resampled: a t interval by group, or none.
FEW_GROUPS = 10
#: Why an estimate has no limits, where all of it is of one group.
ONE_GROUP = "one group only: nothing says how much groups differ"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its interval.

    Args:
        estimate: the figure; NaN if it cannot be had.
        low, high: the limits; NaN if there is no interval.
        confidence: how often such an interval holds the true value, nominally.
        method: how the limits were found; ``"none"`` without an interval.
        groups: how many independent groups it rests on.
        rows: how many rows; with a decay, what is left of them.
        words: what one has to know about it: few groups, or why there is no interval or no estimate.
        p: of the two-sided test that the true value is 0, of a difference; NaN of anything else.

    Example:
        >>> print(Interval(estimate=0.84, low=0.8, high=0.88, confidence=0.95, method="t", groups=32, rows=320))
        0.840 (95%: 0.800 to 0.880; t, 32 groups)
        >>> found = Interval(estimate=0.84, low=0.8, high=0.88, confidence=0.95, method="t", groups=32, rows=320)
        >>> float(found), round(found, 1), f"{found:.2f}"
        (0.84, 0.8, '0.84')
    """

    estimate: float
    low: float
    high: float
    confidence: float
    method: str
    groups: int
    rows: float
    words: str = ""
    p: float = math.nan

    def __post_init__(self) -> None:
        for name in ("estimate", "low", "high"):  # a limit of 1 may come as an integer
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def half_width(self) -> float:
        """Half of the distance of the limits."""
        return (self.high - self.low) / 2

    def __float__(self) -> float:
        return self.estimate

    def __round__(self, digits: int | None = None) -> float:
        return round(self.estimate, digits)

    def __format__(self, spec: str) -> str:
        """The estimate by a format of numbers; without one, the whole as :func:`str` has it."""
        return format(self.estimate, spec) if spec else str(self)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if not self.known:
            return f"{self.estimate:.3f} (no interval: {self.words})"
        return (
            f"{self.estimate:.3f} ({100 * self.confidence:g}%: {self.low:.3f} to {self.high:.3f}; "
            f"{self.method}, {self.groups} groups)"
        )


def none(estimate: float, words: str, *, confidence: float, groups: int, rows: float) -> Interval:
    """An estimate without an interval, and why."""
    return Interval(
        estimate=float(estimate), low=math.nan, high=math.nan, confidence=confidence, method="none",
        groups=int(groups), rows=float(rows), words=words,
    )  # fmt: skip


def limits(
    estimate: float,
    variance: float,
    *,
    freedom: float,
    groups: int,
    rows: float,
    confidence: float,
    bounds: tuple[float, float] | None = None,
    alike: float | None = None,
    at_bound: bool = False,
    words: str = "",
) -> Interval:
    """A t interval from a variance that was found by group; within bounds, where the estimate has some.

    Within bounds it is the interval of Korn & Graubard 1998 (Survey Methodology 24): Clopper and Pearson's, for as many
    rows as would have this variance if they were independent, fewer for few groups. It does not collapse at the bounds.

    Args:
        estimate: the figure.
        variance: of the estimate.
        freedom: degrees of freedom of the variance.
        groups, rows, confidence: as of :class:`Interval`.
        bounds: the least and the largest possible value.
        alike: as how many independent rows all groups count where the estimate is at a bound; as ``groups`` unless
            given.
        at_bound: the estimate is at a bound but for less than a row: as sure as there, at least.
        words: as of :class:`Interval`.
    """
    from scipy import special

    known = {"confidence": confidence, "groups": int(groups), "rows": float(rows), "words": words}
    if bounds is None:
        reach = _t(confidence, freedom) * math.sqrt(variance)
        return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach, method="t by group", **known)
    lowest, highest = bounds
    for bound in bounds:  # at a bound, but for the last digits of a sum, is at it
        if math.isclose(estimate, bound, rel_tol=0, abs_tol=1e-12 * (highest - lowest)):
            estimate = bound
    share = min(max((estimate - lowest) / (highest - lowest), 0.0), 1.0)
    scaled = variance / (highest - lowest) ** 2
    spread = share * (1 - share)
    same = float(groups if alike is None else alike)  # each group says the same: as if it were one row
    if spread <= 0:
        effective = same
    else:
        effective = spread / scaled if scaled > spread / rows else float(rows)
        effective = max(effective, same) if at_bound else effective
        effective *= (special.ndtri(0.5 + confidence / 2) / _t(confidence, freedom)) ** 2
    hits, tail = share * effective, (1 - confidence) / 2
    low = 0.0 if share <= 0 else float(special.betaincinv(hits, effective - hits + 1, tail))
    high = 1.0 if share >= 1 else float(special.betaincinv(hits + 1, effective - hits, 1 - tail))
    return Interval(
        estimate=estimate, low=lowest + low * (highest - lowest), high=lowest + high * (highest - lowest),
        method="t by group, within bounds", **known,
    )  # fmt: skip


def _t(confidence: float, freedom: float) -> float:
    """The quantile of Student's distribution that a two-sided interval reaches to."""
    from scipy import special

    return float(special.stdtrit(freedom, 0.5 + confidence / 2))


def array(values: Any, name: str) -> np.ndarray:
    """One-dimensional float64 numbers.

    Raises:
        InputError: for anything else, or NaN.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        found = np.asarray(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise InputError(f"{name} are numbers, got {values!r:.80}") from None
    if not np.isfinite(found).all():
        raise InputError(f"{name} hold NaN or infinite values: leave these rows out, and say how many")
    return found


def pair_up(rows: int, groups: Any) -> np.ndarray:
    """The number of the group of each row, from 0; each row its own group without ``groups``.

    Raises:
        InputError: if there are more or fewer groups than rows.
    """
    if groups is None:
        return np.arange(rows)
    if isinstance(groups, Tensor):
        groups = groups.detach().cpu().numpy()
    numbers = np.asarray(groups).reshape(-1)
    if len(numbers) != rows:
        raise InputError(f"groups= has an entry for each row, got {len(numbers)} for {rows} rows")
    return np.unique(numbers, return_inverse=True)[1].reshape(-1)


def check_confidence(confidence: float) -> None:
    """Raise an ``InputError`` unless it is a share."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence= is a share between 0 and 1, got {confidence!r}")
