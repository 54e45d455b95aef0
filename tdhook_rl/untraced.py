"""Code that ``torch.compile`` leaves alone where a call falls back to running uncompiled: it reads Python's objects."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

__all__ = ["keep_untraced"]

#: The modules whose functions look at what a policy holds.
_LOOKING = ("held", "outside", "repeatable", "scratch", "start")
_done = False


def keep_untraced() -> None:
    """Let the functions that look at policies never be compiled, once there is a compiler in this process."""
    global _done
    if _done or "torch._dynamo" not in sys.modules:
        return
    _done = True
    from torch._dynamo.decorators import skip

    for function in _functions():
        skip(function)


def _functions() -> Iterator[types.FunctionType]:
    for name in _LOOKING:
        module = sys.modules.get(f"{__package__}.{name}")
        for value in [] if module is None else list(vars(module).values()):
            if getattr(value, "__module__", None) == f"{__package__}.{name}":
                for one in vars(value).values() if isinstance(value, type) else [value]:
                    one = getattr(one, "__wrapped__", one)
                    if isinstance(one, types.FunctionType):
                        yield one
