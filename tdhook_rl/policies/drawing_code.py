"""Whether a function of the user's may draw from the generators of Python and NumPy, as far as its code shows.

To keep the states of these takes longer than most such functions run. Where all that a function names is torch's and
tensordict's, or plain numbers, it draws from torch's generator at most, which is kept in any case.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.policies.outside import names_in, read_cell
from tdhook_rl.sites.known import unknown_modules

#: What draws from no generator but torch's.
_LIBRARIES = frozenset({"torch", "tensordict", "math", "operator", "builtins", "collections", "typing", "functools"})
#: By which code reaches what it does not name.
_ANYTHING = frozenset({"eval", "exec", "__import__", "compile", "globals", "locals", "vars", "open", "input"})
_PLAIN = (Number, str, bytes, type(None), type(...), Tensor, TensorDictBase, torch.dtype, torch.device, torch.Size)


def may_draw_elsewhere(function: Callable[..., Any]) -> bool:
    """Whether a function, with all that it calls, may draw from the generators of Python and NumPy.

    Args:
        function: the user's; of an object of a class of his own it is not known, so that it may.

    Example:
        >>> import random
        >>> may_draw_elsewhere(lambda x: torch.relu(x).sum(-1)), may_draw_elsewhere(lambda x: x * random.random())
        (False, True)
    """
    return not _is_quiet(function, set())


def _is_quiet(value: Any, seen: set[int]) -> bool:
    if isinstance(value, _PLAIN) or id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        # A wrapper may be told the module of what it wraps; where it was written is where its globals are.
        written_there = _is_of_libraries(value) and _is_library(value.__globals__.get("__name__"))
        return all(_is_quiet(one, seen) for one in _held(value)) if written_there else _is_quiet_code(value, seen)
    if isinstance(value, functools.partial):
        return all(_is_quiet(one, seen) for one in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, (tuple, frozenset)):
        return all(_is_quiet(one, seen) for one in value)
    if isinstance(value, types.ModuleType):
        return _is_library(value.__name__)
    if isinstance(value, nn.Module):
        return not unknown_modules(value)
    return isinstance(value, (type, types.BuiltinFunctionType)) and _is_of_libraries(value)


def _is_of_libraries(value: Any) -> bool:
    return _is_library(getattr(value, "__module__", None))


def _is_library(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0].lstrip("_") in _LIBRARIES


def _held(function: types.FunctionType) -> list[Any]:
    """What a function holds itself: the variables of its closure and its defaults."""
    held = [one for cell in function.__closure__ or () for one in read_cell(cell)]
    return [*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_quiet_code(function: types.FunctionType, seen: set[int]) -> bool:
    named, stored = names_in(function.__code__)
    if stored or named & _ANYTHING or _imports(function.__code__):
        return False
    scope = function.__globals__
    reached = [scope[name] for name in named if name in scope]
    return all(_is_quiet(one, seen) for one in (*reached, *_held(function)))


@functools.cache
def _imports(code: types.CodeType) -> bool:
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return any(one.opname == "IMPORT_NAME" for one in dis.get_instructions(code)) or any(map(_imports, inner))
