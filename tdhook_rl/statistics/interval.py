"""An estimate and how sure it is, and the two ways from a variance by group to its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.cautions import ALIKE_RESAMPLES, all_alike

#: Of larger numbers the third powers, which limits are made of, are none in float64.
LARGEST = 1e100
#: Differences of so small a share are of rounding.
ROUNDING = 1e-12


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
        if self.low > self.high:
            raise InputError(f"low= is at most high=, got {self.low:g} and {self.high:g}")

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
        reach = t_quantile(confidence, freedom) * math.sqrt(variance)
        if reach <= ROUNDING * abs(estimate):
            known["words"] = "; ".join(filter(None, (words, all_alike(groups, confidence))))
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
        effective *= (special.ndtri(0.5 + confidence / 2) / t_quantile(confidence, freedom)) ** 2
    hits, tail = share * effective, (1 - confidence) / 2
    low = 0.0 if share <= 0 else float(special.betaincinv(hits, effective - hits + 1, tail))
    high = 1.0 if share >= 1 else float(special.betaincinv(hits + 1, effective - hits, 1 - tail))
    return Interval(
        estimate=estimate, low=lowest + low * (highest - lowest), high=lowest + high * (highest - lowest),
        method="t by group, within bounds", **known,
    )  # fmt: skip


def t_test(off: float, variance: float, freedom: float, least: float, size: float = 0.0) -> float:
    """The p-value of a two-sided t test that nothing is off.

    Args:
        off: how far the estimate is off.
        variance: of the estimate.
        freedom: its degrees of freedom.
        least: the p-value where groups are all alike, and their spread says nothing: that of a test by signs or ranks.
        size: of the estimate; what is less than its rounding is none.
    """
    from scipy import special

    if math.sqrt(variance) <= ROUNDING * max(abs(off), size):
        return 1.0 if abs(off) <= ROUNDING * size else least
    return float(2 * special.stdtr(freedom, -abs(off) / math.sqrt(variance)))


def studentised_ends(pulls: np.ndarray, confidence: float, freedom: float) -> tuple[float, float, str]:
    """Between how many standard errors of resamples the truth lies, the lower first; and what has to be known of it.

    Resamples whose groups are all alike are off by no known number of them: if there are too many, by as many as the
    one that is off most, and as Student's distribution has it at least.

    Args:
        pulls: of :func:`studentised`.
        confidence: of the interval.
        freedom: degrees of freedom of the variance.
    """
    ends, words = [0.5 - confidence / 2, 0.5 + confidence / 2], ""
    with np.errstate(invalid="ignore"):
        found = np.quantile(pulls, ends)
    if not np.isfinite(found).all():
        most = max(np.abs(pulls[np.isfinite(pulls)]).max(initial=0.0), t_quantile(confidence, freedom))
        found, words = np.quantile(pulls.clip(-most, most), ends), ALIKE_RESAMPLES
    return float(found[0]), float(found[1]), words


def studentised(errors: np.ndarray, scales: np.ndarray, least: float) -> np.ndarray:
    """How many standard errors each resample is off; infinitely many where its groups are alike and it is off.

    Args:
        errors: how far each is off.
        scales: their standard errors.
        least: the largest standard error that is none but for rounding.
    """
    there = scales > least
    alike = np.where(np.abs(errors) > least, np.copysign(math.inf, errors), 0.0)
    return np.where(there, errors / np.where(there, scales, 1.0), alike)


def variance_by_group(sums: np.ndarray, counts: np.ndarray, mean: float) -> tuple[float, float]:
    """Of a mean over all rows, from how it moves where each group is left out; and its degrees of freedom.

    Of groups of one size it is the usual variance between groups. A group that holds most of the rows draws the mean to
    itself, and its distance from it says little: by that distance alone the interval of 12 groups, one with 80% of the
    rows, covers .4 of the time at a nominal .95 (Tukey 1958; Bell & McCaffrey 2002).

    Args:
        sums: ``(groups,)``, of the values of each group.
        counts: ``(groups,)``, how many rows each has; at least two groups.
        mean: over all rows.
    """
    groups, rows = len(counts), counts.sum()
    moves = (sums - mean * counts) / (rows - counts)
    effective = rows**2 / np.square(counts).sum()
    return float(np.square(moves).sum() * (groups - 1) / groups), max(min(groups, effective) - 1, 1.0)


def t_quantile(confidence: float, freedom: float) -> float:
    """The quantile of Student's distribution that a two-sided interval reaches to."""
    from scipy import special

    return float(special.stdtrit(freedom, 0.5 + confidence / 2))


def real_numbers(values: Any, name: str) -> np.ndarray:
    """Values as float64, in their shape; NaN stays.

    Raises:
        InputError: for what is no array of real numbers, and for masked values, which are none.
    """
    if isinstance(values, Tensor) and not values.is_complex() and not values.is_meta:
        values = values.detach().to_dense().cpu().double().numpy()
    if np.ma.is_masked(values):
        raise InputError(f"{name} hold {int(np.ma.getmaskarray(values).sum())} masked values: leave these rows out")
    try:
        given = np.asarray(values)
        if given.dtype.kind not in "cmM":  # imaginary parts would be lost, and units of time
            return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        pass
    raise InputError(f"{name} are real numbers, got {' '.join(repr(values).split()):.80}")


def array(values: Any, name: str, largest: float = LARGEST) -> np.ndarray:
    """One-dimensional float64 numbers.

    Raises:
        InputError: for anything else, NaN, or numbers whose limits would be none.
    """
    found = real_numbers(values, name).reshape(-1)
    if not np.isfinite(found).all():
        raise InputError(f"{name} hold NaN or infinite values: leave these rows out, and say how many")
    if len(found) and (reached := np.abs(found).max()) > largest:
        raise InputError(f"{name} reach {reached:.3g}, whose powers float64 does not hold: divide them first")
    return found


def pair_up(rows: int, groups: Any) -> np.ndarray:
    """The number of the group of each row, from 0; each row its own group without ``groups``.

    Raises:
        InputError: if there are more or fewer groups than rows, or a row without a group (NaN, None).
    """
    if groups is None:
        return np.arange(rows)
    if isinstance(groups, Tensor) and not groups.is_meta:
        groups = groups.detach().cpu()
        groups = (groups.double() if groups.is_floating_point() else groups).numpy()
    try:
        numbers = np.asarray(groups).reshape(-1)
    except (TypeError, ValueError, NotImplementedError):
        raise InputError(f"groups= has a number or a name for each row, got {groups!r:.80}") from None
    if len(numbers) != rows:
        raise InputError(f"groups= has an entry for each row, got {len(numbers)} for {rows} rows")
    unknown = np.zeros(rows, dtype=bool)
    if isinstance(groups, np.ma.MaskedArray):
        unknown |= np.ma.getmaskarray(groups).reshape(-1)
    elif numbers.dtype.kind not in "iub":
        given = groups if isinstance(groups, list | tuple) else numbers.tolist()  # beside names NaN is made "nan"
        unknown |= np.array([one is None or (isinstance(one, float) and one != one) for one in given], dtype=bool)
    if unknown.any():
        raise InputError(
            f"groups= names no group for {int(unknown.sum())} of {rows} rows (row {int(unknown.argmax())} first): "
            "leave these rows out, or give them one"
        )
    if numbers.dtype == object:  # of several kinds, which have no order
        return np.array([*map({one: at for at, one in enumerate(dict.fromkeys(numbers))}.__getitem__, numbers)])
    return np.unique(numbers, return_inverse=True)[1].reshape(-1)


def check_confidence(confidence: float) -> None:
    """Raise an ``InputError`` unless it is a share."""
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(f"confidence= is a share between 0 and 1, got {confidence!r}")


def check_resamples(resamples: int, confidence: float) -> None:
    """Raise an ``InputError`` unless there are so many that limits of this confidence can be read off them."""
    check_confidence(confidence)
    least = math.ceil(2 / (1 - confidence) - 1e-9)
    if not isinstance(resamples, Integral) or resamples < least:
        raise InputError(
            f"resamples= is a whole number, at least {least} for confidence={confidence:g}; got {resamples!r}"
        )


def check_bounds(bounds: tuple[float, float] | None) -> None:
    """Raise an ``InputError`` unless they are two numbers, the smaller one first."""
    if bounds is None:
        return
    found = real_numbers(bounds, "bounds").reshape(-1)
    if len(found) != 2 or not -math.inf < found[0] < found[1] < math.inf:
        raise InputError(f"bounds= are the least value there can be and the largest, got {bounds!r}")
