"""How a function of the user's is called: with keywords where it has the documented parameters, else by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tdhook_rl.errors import InputError


def takes_keywords(function: Callable[..., Any], names: Sequence[str], what: str) -> bool:
    """Whether a function has the parameters of these names; if not, it is called with the values in this order.

    Args:
        function: the user's.
        names: the documented parameters.
        what: the argument that the function was given as.

    Raises:
        InputError: if it is no function, or can be called neither way.

    Example:
        >>> takes_keywords(lambda module_key, output: output, ["module_key", "output"], "steer_fn")
        True
        >>> takes_keywords(lambda k, o: o, ["module_key", "output"], "steer_fn")
        False
    """
    if not callable(function) or isinstance(function, type):
        raise InputError(f"{what}= is a function of ({', '.join(names)}), got {function!r}")
    try:
        # What is called is a module's forward; the signature of the module itself would be anything.
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return False
    for keywords in (True, False):
        try:
            signature.bind(**dict.fromkeys(names)) if keywords else signature.bind(*names)
        except TypeError:
            continue
        return keywords
    raise InputError(f"{what} must accept ({', '.join(names)}), but its signature is {signature}")
