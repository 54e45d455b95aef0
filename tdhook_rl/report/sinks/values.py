"""What may be logged under a name: a number, or one of the kinds of :mod:`tdhook_rl.report.media`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.media import Media

__all__ = ["scalars", "sorted_values"]


def sorted_values(metrics: Mapping[str, Any], step: Any) -> tuple[int, dict[str, float], dict[str, Media]]:
    """The step, what is a number, and what is not.

    Raises:
        InputError: that names what is neither, or no name.
    """
    media = {name: value for name, value in metrics.items() if isinstance(value, Media)}
    number, found = scalars({name: value for name, value in metrics.items() if name not in media}, step)
    for name in media:
        _require_name(name)
    return number, found, media


def scalars(metrics: Mapping[str, Any], step: Any) -> tuple[int, dict[str, float]]:
    """The step, and the metrics as numbers: numbers, and tensors and arrays of one element.

    Raises:
        InputError: that names what is no number, or no name.

    Example:
        >>> import torch
        >>> scalars({"loss": torch.tensor([0.25])}, 3)
        (3, {'loss': 0.25})
    """
    found = {}
    for name, value in metrics.items():
        _require_name(name)
        # What comes from another sink is a number already.
        found[name] = value if type(value) is float else _number(value, f"the metric {name!r}")
    number = _number(step, "the step")
    if not number.is_integer():
        raise InputError(f"the step is a whole number, got {step!r}")
    return int(step), found


def _require_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "\n" in name or "\r" in name or "\0" in name or not _is_text(name):
        raise InputError(f"a metric is named by a text of one line, not by {name!r}")


def _is_text(name: str) -> bool:
    """Whether it can be written: halves of a character, as in names of files that are no UTF-8, cannot."""
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False


def _number(value: Any, what: str) -> float:
    original = value
    if getattr(value, "is_meta", False) or np.ma.is_masked(value) or isinstance(value, np.timedelta64):
        raise InputError(f"{what} is {' '.join(repr(value).split()):.80} ({type(value).__name__}), which has no number")
    if hasattr(value, "numel") or hasattr(value, "size"):  # tensors and arrays
        count = value.numel() if callable(getattr(value, "numel", None)) else value.size
        if count != 1:
            raise InputError(
                f"{what} is a {type(value).__name__} of shape {tuple(value.shape)}: log a number, such as its mean, "
                "or a Histogram of it"
            )
        value = value.item()
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        pass
    raise InputError(
        f"{what} is {str(original)[:80]!r} ({type(original).__name__}), which is no number: log one, or what "
        "tdhook_rl.report has beside numbers (Image, Histogram, DataTable, ...)"
    )
