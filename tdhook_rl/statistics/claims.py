"""Many claims at once, and what could have been found at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from tdhook_rl.errors import InputError


def holm(p_values: Any) -> np.ndarray:
    """P-values adjusted so that the chance of any false claim is held (Holm 1979).

    Args:
        p_values: of any shape; NaN, a test that could not be made, stays NaN and is not counted.

    Returns:
        the adjusted values, in the shape given: claim what is at most the level.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    given, made = _checked(p_values)
    tested = given[made]
    order = np.argsort(tested)
    steps = np.maximum.accumulate(tested[order] * np.arange(len(tested), 0, -1))
    adjusted = np.empty_like(tested)
    adjusted[order] = np.minimum(steps, 1.0)
    found = given.copy()
    found[made] = adjusted
    return found


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """P-values adjusted so that the share of false claims among all claims is held (Benjamini & Hochberg 1995).

    Args:
        p_values: of any shape; NaN stays NaN and is not counted.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]
    """
    from scipy import stats

    given, made = _checked(p_values)
    found = given.copy()
    if made.any():
        found[made] = stats.false_discovery_control(given[made], method="bh")
    return found


def minimum_detectable_effect(
    spread: float, groups: int, *, power: float = 0.8, confidence: float = 0.95, samples: int = 1
) -> float:
    """The smallest true effect that a two-sided t test by group finds with this power.

    Args:
        spread: the standard deviation between groups (of the differences, for pairs).
        groups: how many there are (of each sample).
        power: how often the effect is to be found.
        confidence: 1 minus the level of the test.
        samples: 1 for a mean or paired differences, 2 for two independent samples.

    Returns:
        the effect, in the units of ``spread``; infinite for a single group.

    Example:
        >>> round(minimum_detectable_effect(1.0, 10), 3)
        0.996
    """
    from scipy import optimize, stats

    if spread < 0 or not math.isfinite(spread) or groups < 1 or samples not in (1, 2):
        raise InputError(f"spread is not negative, groups positive, samples 1 or 2: got {spread}, {groups}, {samples}")
    if not (0 < power < 1 and 0 < confidence < 1 and power > 1 - confidence):
        raise InputError(f"power and confidence are shares, power above 1 - confidence; got {power} and {confidence}")
    freedom = samples * (groups - 1)
    if freedom < 1:
        return math.inf
    cut = stats.t.ppf(0.5 + confidence / 2, freedom)

    def lacks(shift: float) -> float:
        return float(stats.nct.sf(cut, freedom, shift) + stats.nct.cdf(-cut, freedom, shift)) - power

    top = cut + 4.0
    while lacks(top) < 0:
        top *= 2
    return float(optimize.brentq(lacks, 0.0, top)) * spread * math.sqrt(samples / groups)


def _checked(p_values: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(p_values, Tensor):
        p_values = p_values.detach().cpu().numpy()
    given = np.array(p_values, dtype=np.float64)
    made = ~np.isnan(given)
    if ((given[made] < 0) | (given[made] > 1)).any():
        raise InputError(f"p-values lie between 0 and 1, got {given[made].min():g} to {given[made].max():g}")
    return given, made
