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

M = TypeVar("M", bound=nn.Module)

#: How deep functions are looked for in what a module holds.
DEEP = 6
_HELD_OTHERWISE = frozenset(("_parameters", "_buffers", "_modules"))
#: Whose objects hold no function that names modules of the policy.
_FOREIGN = frozenset(("torch", "tensordict", "torchrl", "tdhook_rl", "numpy", "gymnasium", "logging", "threading"))
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
    clone = copy.deepcopy(module, memo)
    functions.bind(memo)
    return clone


class _Functions:
    """Functions in a module that name modules of it, each with one that has cells of its own.

    Attributes:
        new: these, by the ``id`` of the old ones.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = dict(module.named_modules())
        self.new: dict[int, types.FunctionType] = {}
        self._own = {id(child) for child in modules.values()}
        self._looked_at: dict[int, bool] = {}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        self._functions: list[types.FunctionType] = []
        self._methods: list[tuple[nn.Module, str, types.MethodType]] = []
        for path, child in modules.items():
            for name, value in vars(child).items():
                if name not in _HELD_OTHERWISE and not isinstance(value, nn.Module):
                    self._visit(value, f"{path}.{name}" if path else name, 0)
                    if isinstance(value, types.MethodType) and id(value.__func__) in self.new:
                        self._methods.append((child, name, value))

    def bind(self, memo: dict[int, Any]) -> None:
        """Let the new functions name what the copy holds."""
        for old, new in self._cells.values():
            new.cell_contents = self._copied(old.cell_contents, memo)
        for function in self._functions:
            own = self.new[id(function)]
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
        self._looked_at[id(function)] = False  # it may name itself
        compiled = compiled_from(function)
        if compiled is not None:
            if self._names(compiled, path, depth + 1):
                raise PreparationError(
                    f"{path!r} of the policy was compiled by torch.compile before it was prepared, and runs the "
                    "modules and weights that it was made of, without hooks: leave it as it is written, prepare the "
                    "policy, and compile the hooked one, or pass `compile_policy` to the collector"
                )
            return False
        cells = self._cells_of(function, path, depth)
        held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        defaults = [self._names(one, path, depth + 1) for one in held]
        if not cells and not any(defaults):
            return False
        self._looked_at[id(function)] = True
        for cell in self._cells_of(function, path, depth):  # its own, where it names itself
            self._cells.setdefault(id(cell), (cell, types.CellType()))
        closure = function.__closure__ and tuple(
            self._cells[id(cell)][1] if id(cell) in self._cells else cell for cell in function.__closure__
        )
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        functools.update_wrapper(new, function, updated=())
        del new.__wrapped__  # type: ignore[attr-defined]
        self.new[id(function)] = new
        self._functions.append(function)
        return True

    def _cells_of(self, function: types.FunctionType, path: str, depth: int) -> list[types.CellType]:
        return [cell for cell in function.__closure__ or () if self._cell_names(cell, path, depth)]

    def _cell_names(self, cell: types.CellType, path: str, depth: int) -> bool:
        try:
            return self._names(cell.cell_contents, path, depth + 1)
        except ValueError:  # it is empty
            return False


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
