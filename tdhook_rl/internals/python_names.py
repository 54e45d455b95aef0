"""What is used of the insides of Python's standard library."""

from __future__ import annotations

import copy
import threading
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["ABC_STATE", "codes", "copied_as_pickled", "is_owned", "is_protocol", "parser"]

# `codes` and `parser` are what a regular expression is read into and by: no public call gives the parts of one, and
# whether it may take for ever has to be known before it is matched.

#: What the names start with that ``abc.ABCMeta`` puts into a class: nothing of the user's, and nothing else marks them.
ABC_STATE = "_abc"

#: Whether the calling thread holds a ``threading.RLock``: its public interface has no question, only attempts.
is_owned: Any = type(threading.RLock())._is_owned  # type: ignore[attr-defined]


def copied_as_pickled(value: Any, memo: dict[int, Any]) -> Any:
    """The deep copy of an object whose class has a ``__deepcopy__``, which calls this: ``copy.deepcopy`` would call it
    again."""
    return copy._reconstruct(value, memo, *value.__reduce_ex__(4))  # type: ignore[attr-defined]


def is_protocol(kind: Any) -> bool:
    """Whether a class is a ``typing.Protocol``; ``typing.is_protocol`` says so from Python 3.13 on."""
    return getattr(kind, "_is_protocol", False)
