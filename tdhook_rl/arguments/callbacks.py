"""How a function of the user's is called: with keywords where it has the documented parameters, else by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tdhook_rl.errors import InputError


def takes_keywords(function: Callable[..., Any], names: Sequence[str], what: str, optional: Sequence[str] = ()) -> bool:
    """Whether a function has the parameters of these names; if not, it is called with the values in this order.

    Args:
        function: the user's.
        names: the documented parameters.
        what: the argument that the function was given as.
        optional: parameters that it may have too, which are always given by keyword, see :func:`has_parameter`.

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
    signature = _signature(function)
    if signature is None:
        return False
    beside: dict[str, Any] = dict.fromkeys(name for name in optional if has_parameter(function, name))
    for keywords in (True, False):
        try:
            signature.bind(**dict.fromkeys(names), **beside) if keywords else signature.bind(*names, **beside)
        except TypeError:
            continue
        return keywords
    raise InputError(f"{what} must accept ({', '.join(names)}), but its signature is {signature}")


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of a name, which can be given by keyword.

    Example:
        >>> has_parameter(lambda k, o, rows: o, "rows"), has_parameter(lambda k, o: o, "rows")
        (True, False)
    """
    signature = _signature(function)
    found = None if signature is None else signature.parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        # What is called is a module's forward; the signature of the module itself would be anything.
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return None
