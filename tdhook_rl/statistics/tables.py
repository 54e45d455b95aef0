"""Tables of counts and sums by group: what can be one, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.statistics.interval import real_numbers

#: Why a score has no limits, or is none, where predictions are far off.
TOO_FAR = "the predictions are too far from the values to be scored in float64"
#: What a decay and another order of additions leave of a sum, as a share of it.
_ROUNDED = 1e-6


def two_counts(first: Any, second: Any, name: str, columns: str) -> tuple[np.ndarray, np.ndarray]:
    """Two tables of counts of one shape, ``(groups, columns)``.

    Raises:
        InputError: for anything else, or what cannot be a count.
    """
    one, two = (real_numbers(table, name) for table in (first, second))
    if one.shape != two.shape or one.ndim != 2:
        raise InputError(f"{name} are (groups, {columns}) both, got {one.shape} and {two.shape}")
    for table in (one, two):
        wrong = table[~(np.isfinite(table) & (table >= 0))]
        if len(wrong):
            raise InputError(f"{name} are numbers from 0 on, got {wrong[0]:g}")
    return one, two


def hits(right: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """How many rows of each class were right, and of how many, ``(groups, classes)``.

    Raises:
        InputError: for what cannot be a count, or more right rows than there are.
    """
    right, rows = two_counts(right, rows, "counts", "classes")
    more = np.argwhere(right > rows * (1 + _ROUNDED))
    if len(more):
        group, label = more[0]
        raise InputError(
            f"no more rows are right than there are, got {right[group, label]:g} of {rows[group, label]:g} "
            f"(group {group}, class {label}): right= comes first, then rows="
        )
    return np.minimum(right, rows), rows


def sums_of_squares(sums: Any) -> np.ndarray:
    """Rows, the sum of values, of their squares and of squared errors, ``(groups, 4)``.

    Raises:
        InputError: for another shape, or what no values have as sums.
    """
    sums = real_numbers(sums, "sums")
    if sums.ndim != 2 or sums.shape[1] != 4:
        raise InputError(f"sums are (groups, 4), got {sums.shape}")
    rows, values, squares, errors = sums.T
    with np.errstate(all="ignore"):
        beyond = np.square(values) - rows * squares > _ROUNDED * rows * np.abs(squares).max(initial=0.0)
    wrong = (rows < 0) | (errors < 0) | beyond
    if wrong.any():
        group = int(wrong.argmax())
        rows, values, squares, errors = sums[group]
        raise InputError(
            f"no values have these sums (group {group}): {rows:g} rows, sum {values:g}, of squares {squares:g}, of "
            f"squared errors {errors:g}; none but the second is below 0, and its square is at most rows times the third"
        )
    return sums


def class_in_one_group(there: np.ndarray, groups: np.ndarray) -> str:
    """Why there is no interval, where a class is in one group.

    Args:
        there: ``(all classes,)``, which are scored.
        groups: ``(classes,)``, in how many groups each of these is.
    """
    label = int(np.flatnonzero(there)[groups.argmin()])
    return f"class {label} is in one group only: nothing says how much groups differ"
