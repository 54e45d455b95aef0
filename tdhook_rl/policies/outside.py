"""What a forward can write beside what its modules hold: class attributes, variables of closures, globals, defaults.

These are shared with the user's policy and with whatever else a program does, so they are kept only for policies whose
passes were seen to differ without that. They are found by following what the code of a forward names.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from tdhook_rl.internals.dynamo_names import compiled_from
from tdhook_rl.internals.python_names import ABC_STATE
from tdhook_rl.policies.module_copies import is_plain
from tdhook_rl.policies.mutable_state import Kind, MutableState, StatePart, find_state
from tdhook_rl.sites.classes import Swapped
from tdhook_rl.sites.known import own_class, user_code
from tdhook_rl.sites.listed import modules
from tdhook_rl.sites.root_hooks import hooks_of

#: Whose code is not followed.
_LIBRARIES = frozenset({"tdhook_rl", "torch", "tensordict", "torchrl", "numpy", "gymnasium", *sys.stdlib_module_names})
#: How many functions and classes are followed.
AT_MOST = 1_000


def find_state_inside_and_outside(modules: list[tuple[str, nn.Module]]) -> MutableState:
    """What :func:`~tdhook_rl.policies.mutable_state.find_state` finds, and what forwards write elsewhere."""
    things: list[StatePart] = []
    values: list[tuple[Any, str, str]] = []
    seen: set[int] = set()
    for _, module in modules:
        owner = own_class(module).__name__
        for kind, thing, path, inner in _reached(module, seen):
            if kind is not None:
                things.append(StatePart(path, owner, kind, thing))
            values += [(value, inner_path, owner) for inner_path, value in inner]
    return find_state(modules, things, values)


def functions_of(module: nn.Module) -> list[types.FunctionType]:
    """The functions of the user's that the forward of a module may reach."""
    found = [thing for _, thing, *_ in _reached(module, set()) if isinstance(thing, types.FunctionType)]
    return [function for function in found if compiled_from(function) is None]


def compiled_functions(policy: nn.Module) -> list[str]:
    """The names of functions that ``torch.compile`` made and that forwards of a policy may reach."""
    seen: set[int] = set()
    found = [
        thing for module in modules(policy) if not _is_known(module, seen) for _, thing, *_ in _reached(module, seen)
    ]
    return [one.__qualname__ for one in found if isinstance(one, types.FunctionType) and compiled_from(one) is not None]


def _is_known(module: nn.Module, seen: set[int]) -> bool:
    """Whether what a module reaches is what others of its class do, and that was looked at."""
    return id(type(module)) in seen and is_plain(module)


def of_compiled(functions: Sequence[str]) -> str:
    """Why a module may run without its hooks, where a policy has compiled functions; for a message."""
    if not functions:
        return ""
    return (
        f"; torch.compile was put on {functions[0]}, and what it compiled for a call of the user's own policy knows no "
        "hooks: leave that as it is written and compile the hooked policy, or pass `compile_policy` to the collector"
    )


Found = tuple[Kind | None, Any, str, list[tuple[str, Any]]]


def _reached(module: nn.Module, seen: set[int]) -> Iterator[Found]:
    """Classes, variables and functions that the forward of a module reaches; with the values that are in them."""
    own = vars(module)
    methods = [own.get("forward", type(module).forward), type(module), *own.values()]
    methods += [hook if (code := user_code(hook)) is None else code for hook in hooks_of(module)]
    waiting = [one for one in methods if isinstance(one, (type, types.FunctionType, types.MethodType))]
    while waiting and len(seen) < AT_MOST:
        one = waiting.pop()
        one = getattr(one, "__func__", one)
        if compiled_from(one) is not None:
            yield None, one, one.__qualname__, []
        one = getattr(one, "__wrapped__", one)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, type):
            waiting += [base for base in one.__mro__[1:] if _is_followed(base)]
            if _is_followed(one):
                yield _CLASS, one, one.__name__, [(f"{one.__name__}.{name}", value) for name, value in _data(one)]
        elif isinstance(one, types.FunctionType) and _is_followed(one):
            variables, reached = _variables(one, type(module))
            yield None, one, one.__qualname__, []
            yield from variables
            waiting += [value for value in reached if isinstance(value, (type, types.FunctionType, types.MethodType))]


def _is_followed(one: Any) -> bool:
    home = one.__module__ or ""  # of code that was run without a name
    return issubclass(one, Swapped) if _is_swapped(one) else home.partition(".")[0] not in _LIBRARIES


def _is_swapped(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, Swapped) and "_base" in vars(one)


def _data(kind: type) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(kind).items() if not name.startswith(("__", "_hooked", ABC_STATE))]


def _variables(function: types.FunctionType, kind: type) -> tuple[list[Found], list[Any]]:
    """The variables of a function that outlive a call; and the functions and classes that it may call."""
    name, named, stored = function.__qualname__, *names_in(function.__code__)
    found: list[Found] = []
    values: list[tuple[str, Any]] = []
    for cell, variable in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
        if variable != "__class__":
            content = read_cell(cell)
            found.append((_CELL, cell, variable, [(variable, one) for one in content]))
            values += [(variable, one) for one in content]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    inner = [(f"{name} (a default)", value) for value in defaults]
    found.append((_CONTENT, vars(function), name, [*inner, *vars(function).items()]))
    scope = function.__globals__
    here = [(variable, scope[variable]) for variable in named if variable in scope]
    found.append((None, None, name, here))
    stored |= {variable for variable, value in here if isinstance(value, Tensor)}  # which a pass is given copies of
    if stored:
        found.append((_GLOBALS, (scope, stored), ", ".join(sorted(stored)), []))
    methods = [getattr(kind, variable, None) for variable in named]
    return found, [*(value for _, value in (*values, *here)), *methods]


@cache
def names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a piece of code, and functions written in it, use; and the globals that they set."""
    named, stored = set(code.co_names), set()
    stored |= {one.argval for one in dis.get_instructions(code) if one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_in(constant)
            named, stored = named | inner[0], stored | inner[1]
    return frozenset(named), frozenset(stored)


# ---------------------------------------------------------------------- kinds


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() == then.keys() and all(value is then[name] for name, value in now.items())


def _write_class(kind: type, content: dict[str, Any]) -> None:
    for name in [name for name in vars(kind) if name not in content]:
        type.__delattr__(kind, name)
    for name, value in content.items():
        if vars(kind).get(name, kind) is not value:
            type.__setattr__(kind, name, value)


def read_cell(cell: types.CellType) -> list[Any]:
    """What a variable of a closure holds, in a list, which is empty where it holds nothing."""
    try:
        return [cell.cell_contents]
    except ValueError:  # it has none yet
        return []


def _write_cell(cell: types.CellType, content: list[Any]) -> None:
    if content:
        cell.cell_contents = content[0]
    else:
        del cell.cell_contents


def _same_cell(cell: types.CellType, content: list[Any]) -> bool:
    now = read_cell(cell)
    return len(now) == len(content) and all(one is other for one, other in zip(now, content, strict=True))


def _read_globals(thing: tuple[dict[str, Any], frozenset[str]]) -> dict[str, Any]:
    return {name: thing[0][name] for name in thing[1] if name in thing[0]}


def _write_globals(thing: tuple[dict[str, Any], frozenset[str]], content: dict[str, Any]) -> None:
    for name in thing[1]:
        if name in content:
            thing[0][name] = content[name]
        else:
            thing[0].pop(name, None)


def _write_content(thing: dict[str, Any], content: dict[str, Any]) -> None:
    for name in [name for name in thing if name not in content]:
        del thing[name]
    thing.update(content)


_CLASS = Kind(lambda kind: dict(vars(kind)), lambda kind, then: _same(dict(vars(kind)), then), _write_class)
_CELL = Kind(read_cell, _same_cell, _write_cell)
_CONTENT = Kind(dict, _same, _write_content)
_GLOBALS = Kind(_read_globals, lambda thing, then: _same(_read_globals(thing), then), _write_globals)
