"""Functions that a policy keeps and that name its modules: those of a copy name the modules of the copy.

``copy.deepcopy`` leaves functions as they are. Of ``self.head = lambda x: self.last(self.first(x))`` the copy would run
the user's own modules: past the hooks, the edited weights and the state of the copy.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from tdhook_rl.errors import PreparationError
from tdhook_rl.internals.dynamo_names import compiled_from
from tdhook_rl.policies.module_copies import deep_copy_of
from tdhook_rl.policies.outside import read_cell
from tdhook_rl.sites.listed import named_modules

M = TypeVar("M", bound=nn.Module)

#: How deep functions are looked for in what a module holds.
DEEP = 6
_HELD_OTHERWISE = frozenset(("_parameters", "_buffers", "_modules"))
#: Whose objects hold no function that names modules of the policy.
_FOREIGN = frozenset(("torch", "tensordict", "torchrl", "tdhook_rl", "numpy", "gymnasium", "logging", "threading"))
_ATOMS = frozenset((bool, int, float, str, type(None)))
_MOSTLY = _ATOMS | {dict, collections.OrderedDict, set, list, tuple}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type, types.BuiltinFunctionType)


def deep_copy(module: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy of a module, of which functions name the modules of the copy.

    Args:
        module: what is copied.
        memo: of :func:`copy.deepcopy`: what the copy holds in the place of what.

    Raises:
        PreparationError: if it holds a function that ``torch.compile`` made of one that names its modules.
    """
    memo = {} if memo is None else memo
    functions = _Functions(module)
    memo.update(functions.new)
    clone = deep_copy_of(module, memo)
    functions.bind(memo)
    return clone


def runs_a_module(function: Any, depth: int = 0) -> bool:
    """Whether a function leads to a module by what it closes over, by a default, an argument or its owner."""
    if isinstance(function, nn.Module):
        return True
    if depth > DEEP or not isinstance(function, (types.FunctionType, types.MethodType, functools.partial)):
        return False
    if isinstance(function, types.MethodType):
        held = [function.__self__, function.__func__]
    elif isinstance(function, functools.partial):
        held = [one for _, one in _inside(function, "")]
    else:
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        held += [value for cell in function.__closure__ or () for value in read_cell(cell)]
    return any(runs_a_module(one, depth + 1) for one in held)


class _Functions:
    """Functions in a module that name modules of it, each with one that has cells of its own.

    Attributes:
        new: these, by the ``id`` of the old ones.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = dict(named_modules(module))
        self.new: dict[int, types.FunctionType] = {}
        self._own = {id(child) for child in modules.values()}
        self._found: dict[int, types.FunctionType] = {}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        before = -1
        while len(self._found) > before:  # of two that name each other, the second look tells
            before = len(self._found)
            self._looked_at: dict[int, bool] = {}
            for path, child in modules.items():
                for name, value in vars(child).items():
                    if value.__class__ in _MOSTLY and (value.__class__ in _ATOMS or not value):  # this is done often
                        continue
                    if name not in _HELD_OTHERWISE and not isinstance(value, nn.Module):
                        self._visit(value, f"{path}.{name}" if path else name, 0)
        for key, function in self._found.items():
            self.new[key] = self._renewed(function)
        self._methods = [
            (child, name, value)
            for child in modules.values() if self.new
            for name, value in vars(child).items()
            if isinstance(value, types.MethodType) and id(value.__func__) in self.new
        ]  # fmt: skip

    def bind(self, memo: dict[int, Any]) -> None:
        """Let the new functions name what the copy holds."""
        for old, new in self._cells.values():
            new.cell_contents = self._copied(old.cell_contents, memo)
        for key, own in self.new.items():
            function = self._found[key]
            own.__defaults__ = function.__defaults__ and tuple(self._copied(one, memo) for one in function.__defaults__)
            own.__kwdefaults__ = self._all_copied(function.__kwdefaults__, memo) if function.__kwdefaults__ else None
            vars(own).update(self._all_copied(vars(function), memo))
        for child, name, method in self._methods:
            vars(memo[id(child)])[name] = self._copied(method, memo)

    def _all_copied(self, values: Mapping[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
        return {key: self._copied(value, memo) for key, value in values.items()}

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        if not self._names(value, "", 0):
            return value
        if isinstance(value, types.MethodType):  # deepcopy would leave its function
            function = self.new.get(id(value.__func__), value.__func__)
            return types.MethodType(function, self._copied(value.__self__, memo))
        return copy.deepcopy(value, memo)

    def _visit(self, value: Any, path: str, depth: int) -> None:
        """Find the functions in what a module holds."""
        if isinstance(value, _SIMPLE) or depth > DEEP:
            return
        if isinstance(value, (types.FunctionType, types.MethodType)):
            self._names(value, path, depth)
            return
        for where, inner in _inside(value, path):
            if not isinstance(inner, nn.Module):
                self._visit(inner, where, depth + 1)

    def _names(self, value: Any, path: str, depth: int) -> bool:
        """Whether a value is, or leads to, one of the modules."""
        if isinstance(value, nn.Module):
            return id(value) in self._own
        if isinstance(value, _SIMPLE) or depth > DEEP:
            return False
        if isinstance(value, types.FunctionType):
            return self._is_new(value, path, depth)
        if isinstance(value, types.MethodType):
            function = self._names(value.__func__, path, depth + 1)
            return self._names(value.__self__, path, depth + 1) or function
        found = [self._names(inner, where, depth + 1) for where, inner in _inside(value, path)]  # each is looked at
        return any(found)

    def _is_new(self, function: types.FunctionType, path: str, depth: int) -> bool:
        known = self._looked_at.get(id(function))
        if known is not None:
            return known
        self._looked_at[id(function)] = id(function) in self._found  # it may name itself
        compiled = compiled_from(function)
        if compiled is not None:
            if self._names(compiled, path, depth + 1):
                raise PreparationError(
                    f"{path!r} of the policy was compiled by torch.compile before it was prepared, and runs the "
                    "modules and weights that it was made of, without hooks: leave it as it is written, prepare the "
                    "policy, and compile the hooked one, or pass `compile_policy` to the collector"
                )
            return False
        held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        held += tuple(value for cell in function.__closure__ or () for value in read_cell(cell))
        named = [self._names(one, path, depth + 1) for one in held]  # each is looked at
        if any(named):
            self._looked_at[id(function)], self._found[id(function)] = True, function
        return any(named)

    def _renewed(self, function: types.FunctionType) -> types.FunctionType:
        """The same function with cells of its own, still empty, where these lead to the modules."""
        closure = function.__closure__ and tuple(self._cell(cell) for cell in function.__closure__)
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        functools.update_wrapper(new, function, updated=())
        del new.__wrapped__  # type: ignore[attr-defined]
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._cells and any(self._names(one, "", 0) for one in read_cell(cell)):
            self._cells[id(cell)] = cell, types.CellType()
        return self._cells[id(cell)][1] if id(cell) in self._cells else cell


def _inside(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a container, or an object of a class of the user's, holds."""
    if isinstance(value, functools.partial):
        yield from ((path, one) for one in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", one) for key, one in value.items())
    elif isinstance(value, (list, tuple, set, collections.deque)):
        yield from ((f"{path}[{place}]", one) for place, one in enumerate(value))
    elif type(value).__module__.partition(".")[0] not in _FOREIGN and isinstance(
        own := getattr(value, "__dict__", None), dict
    ):
        yield from ((f"{path}.{name}", one) for name, one in own.items())
