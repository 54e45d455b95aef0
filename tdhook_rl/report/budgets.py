"""How much a monitor logs, and how often: limits, and what may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from tdhook_rl.arguments.checked import Checked
from tdhook_rl.errors import InputError

__all__ = ["Budgets", "require_options"]


@dataclass(frozen=True, kw_only=True)
class Budgets(metaclass=Checked):
    """How much is logged. What goes beyond is said once; numbers are in the local files nevertheless.

    Args:
        keys: names that loggers other than the local files are given.
        features: inputs with more features than this, and without names, are not listed one by one.
        images: of each attribution, each time.
        bytes: of pictures, tables and artifacts in the folder.
    """

    keys: int = 500
    features: int = 64
    images: int = 4
    bytes: float = 1e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise InputError(f"a budget is not negative, got {name}={value}")


def require_options(prefix: str, **counts: tuple[int, int]) -> None:
    """Refuse counts below what they may be, each given as ``(value, least)``, and a prefix of two levels.

    Raises:
        InputError: that names the first.
    """
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or value < least:
            raise InputError(f"{name}= is a whole number from {least} on, got {value!r}")
    if not prefix.strip(" .") or "/" in prefix or not prefix.isprintable():
        raise InputError(f"prefix= is one word without a slash, as names have two levels; got {prefix!r}")
