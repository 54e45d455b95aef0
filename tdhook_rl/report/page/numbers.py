"""Numbers as people read them: sensible digits, frames as 82k, sizes in kB, and what is not finite in words."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from tdhook_rl.statistics import Interval

#: Where there is nothing.
NOTHING = "-"
_LARGEST = 10**300


def is_number(value: Any) -> bool:
    """Whether it is a number; truth values are none, and neither are integers that are no floats."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, Real)


def number(value: Any) -> str:
    """A number with about three digits that count.

    Example:
        >>> [number(one) for one in (0.98765, 1234567, 12345.6, 0.0000312, -2.0, 0, float("nan"), 1e300)]
        ['0.988', '1,234,567', '12,346', '3.12e-05', '-2', '0', 'not finite', '1e+300']
    """
    if isinstance(value, int) or (hasattr(value, "dtype") and getattr(value.dtype, "kind", "") in "iu"):
        return f"{int(value):,}" if abs(int(value)) < 10**15 else f"{float(value):.3g}"
    value = float(value)
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    size = abs(value)
    if value == int(value) and size < 1e12:
        return f"{int(value):,}"
    if size >= 1e7 or size < 1e-3:
        return f"{value:.3g}"
    if size >= 100:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def frames(step: float) -> str:
    """Frames, shortly.

    Example:
        >>> [frames(one) for one in (640, 2048, 81920, 1_500_000, 2_000_000_000)]
        ['640', '2,048', '82k', '1.5M', '2G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(step) >= size:
            unit = step / (1e3 if letter == "k" else size)
            return f"{unit:.0f}{letter}" if unit >= 10 or unit == int(unit) else f"{unit:.1f}{letter}"
    return f"{step:,.0f}"


def amount(size: float) -> str:
    """Bytes.

    Example:
        >>> amount(312), amount(45_678), amount(1_234_567)
        ('312 bytes', '46 kB', '1.2 MB')
    """
    for limit, unit, digits in ((1e3, "bytes", 0), (1e6, "kB", 0), (1e9, "MB", 1)):
        if size < limit:
            return f"{size / (limit / 1e3):.{digits}f} {unit}"
    return f"{size / 1e9:.1f} GB"


def shown(value: Any) -> str:
    """Any cell as text: intervals with their limits, or why there are none.

    Example:
        >>> shown(Interval(estimate=0.84, low=0.8, high=0.88, confidence=0.95, method="t", groups=32, rows=320))
        '0.840 (0.800 to 0.880)'
        >>> shown(None), shown(True), shown(3)
        ('-', 'yes', '3')
    """
    if isinstance(value, Interval):
        if not value.known:
            return f"{_even(value.estimate)} (no interval: {value.words or 'none was computed'})"
        return f"{_even(value.estimate)} ({_even(value.low)} to {_even(value.high)})"
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if is_number(value) else str(value)


def _even(value: float) -> str:
    """With as many digits as the limits beside it."""
    return f"{value:.3f}" if 1e-3 <= abs(value) < 10 or value == 0 else number(value)
