"""Which function it is: by its code and by what it has at hand, in words that are the same in every process.

Of a function of the user's this is what its name does not say: constants, defaults, what it closes over, globals and
functions of its own package that it names, what it is bound to. Functions of libraries are what they are called.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import random
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.files.digests import content_of
from tdhook_rl.internals.torch_names import held_buffers, held_parameters

#: What is said of something that is held and of which nothing says whether it is the same.
UNTOLD = "cannot be told from another"
#: More than so many objects are not gone through.
_MOST = 20_000
_PLAIN = (bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, os.PathLike, np.generic)
_HELD = (Tensor, tuple, list, dict, set, frozenset, *_PLAIN)
#: What they will give next is in none of their attributes.
_MOVING = (Iterator, random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def in_words(value: Any) -> str:
    """An option, in words that are the same in every process, and others where it is another.

    Example:
        >>> in_words(("next", "reward")), in_words([0.5, None])
        ("('next', 'reward')", '[0.5, None]')
    """
    if value is None or isinstance(value, (bool, int, float, str, range)):
        return repr(value)
    if isinstance(value, tuple) and all(isinstance(one, str) for one in value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_words, value))}]"
    if is_dataclass(value) and not isinstance(value, type):
        options = (f"{one.name}={in_words(getattr(value, one.name))}" for one in fields(value))
        return f"{type(value).__qualname__}({', '.join(options)})"
    if isinstance(value, Tensor):
        return f"Tensor({tuple(value.shape)}, {number_of(value)})"
    return named_function(value)


def untold_in(facts: Any) -> list[str]:
    """Of facts in JSON those of which it was not told all."""
    if isinstance(facts, str):
        return [facts] if f"which {UNTOLD})" in facts else []
    parts = facts.values() if isinstance(facts, Mapping) else facts if isinstance(facts, list) else ()
    return [one for part in parts for one in untold_in(part)]


def number_of(value: Any) -> str:
    """A number of all that a value holds."""
    told = _Told("")
    told.add(value)
    return told.summed.hexdigest()


def named_function(function: Any) -> str:
    """A function, or what can be called as one: its name, a number of what it does, and what cannot be told of it.

    Example:
        >>> def above(limit):
        ...     return lambda rows: rows["reward"] > limit
        >>> named_function(above(1)) == named_function(above(1)), named_function(above(1)) == named_function(above(2))
        (True, False)
    """
    known = function.func if isinstance(function, functools.partial) else function
    name = getattr(known, "__qualname__", None)
    kind = known if name is not None else type(known)
    told = _Told(_package(kind))
    try:
        told.add(function)
    except RecursionError:
        told.untold.append("what is nested too deeply")
    said = f"{_module(kind)}.{kind.__qualname__} {told.summed.hexdigest()}"
    untold = ", ".join(sorted(set(told.untold))[:3])
    return f"{said} (holds {untold}, which {UNTOLD})" if untold else said


def _module(kind: Any) -> str:
    return str(getattr(kind, "__module__", None) or "builtins")


def _package(kind: Any) -> str:
    """Whose functions are followed: those of its own package, unless that is this library."""
    found = _module(kind).partition(".")[0]
    return "" if found == "tdhook_rl" else found


class _Told:
    """Sums up all that makes a function what it is."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.summed = hashlib.blake2b(digest_size=8)
        self.untold: list[str] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # by id; held, so that no other object gets the id

    def add(self, value: Any) -> None:
        """Take something in."""
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            self._say(type(value).__name__, value)
        elif id(value) in self._seen:
            self._say("again", self._seen[id(value)][0])
        elif len(self._seen) >= _MOST:
            self._miss(value)
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_new(value)

    def _say(self, *words: object) -> None:
        self.summed.update(f"{' '.join(map(str, words))!r};".encode())

    def _miss(self, value: Any) -> None:
        self._say("untold", type(value).__qualname__)
        self.untold.append(f"a {type(value).__qualname__}")

    def _add_new(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.MethodType):
            self._add_all("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._add_all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, enum.Enum):
            self._say(type(value).__qualname__, value.name)
        elif isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._say("array", value.dtype, value.shape)
            self.summed.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (set, frozenset)):
            self._add_set(value)
        elif isinstance(value, (Mapping, TensorDictBase)):
            pairs = sorted(((str(key), one) for key, one in value.items()), key=lambda pair: pair[0])
            self._add_all(type(value).__name__, (part for pair in pairs for part in pair))
        elif isinstance(value, (list, tuple)) and all(type(one) in (bool, int, float, str) for one in value):
            self._say(type(value).__name__, value if type(value) in (list, tuple) else [*value])
        elif isinstance(value, (list, tuple, np.ndarray)):
            self._add_all(type(value).__name__, (len(value), *value))
        elif isinstance(value, weakref.ref):
            self.add(value())
        else:
            self._add_object(value)

    def _add_all(self, kind: str, parts: Iterable[Any]) -> None:
        self._say(kind)
        for part in parts:
            self.add(part)

    def _add_set(self, value: set[Any] | frozenset[Any]) -> None:
        found = []
        for one in value:
            told = _Told(self.package)
            told.add(one)
            self.untold += told.untold
            found.append(told.summed.hexdigest())
        self._say("set", *sorted(found))

    def _add_tensor(self, value: Tensor) -> None:
        self._say("tensor", tuple(value.shape), value.dtype)
        try:
            self.summed.update(content_of(value))
        except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantised or meta
            self._miss(value)

    def _add_function(self, value: types.FunctionType) -> None:
        self._say("function", _module(value), value.__qualname__)
        self._add_all("defaults", (value.__defaults__, value.__kwdefaults__))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self._say("cell", name)
            try:
                held = cell.cell_contents
            except ValueError:  # it has no value yet
                continue
            self.add(held)
        if self._follows(value):
            self.add(value.__code__)
            for name in sorted(_names(value.__code__) & value.__globals__.keys()):
                self._say("global", name)
                self.add(value.__globals__[name])
        if hasattr(value, "__wrapped__"):
            self.add(value.__wrapped__)

    def _follows(self, kind: Any) -> bool:
        return bool(self.package) and _module(kind).partition(".")[0] == self.package

    def _add_code(self, value: types.CodeType) -> None:
        self._say("code", value.co_code, value.co_names, value.co_argcount, value.co_kwonlyargcount)
        self._add_all("constants", value.co_consts)

    def _add_class(self, value: type) -> None:
        self._say("class", _module(value), value.__qualname__)
        if not self._follows(value):
            return
        self._add_all("bases", value.__bases__)
        for name, one in sorted(vars(value).items()):
            inner = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
            if isinstance(inner, types.FunctionType):
                self._say(name)
                self.add(inner)

    def _constants(self, kind: type) -> dict[str, Any]:
        """What an object of a class has from it: where only the class is named, it may be a count that moves on."""
        of = [one for one in reversed(kind.__mro__) if self._follows(one)]
        return {
            name: held
            for one in of
            for name, held in vars(one).items()
            if isinstance(held, _HELD) and not name.startswith("__")
        }

    def _add_object(self, value: Any) -> None:
        name = getattr(value, "__qualname__", None) or (getattr(value, "__name__", None) if callable(value) else None)
        if isinstance(value, _MOVING):
            self._miss(value)
        elif isinstance(name, str):  # of a library: a builtin, a ufunc, what decorators make
            owner = getattr(value, "__self__", None)
            self._say("named", _module(value), name)
            if not isinstance(owner, (type, types.ModuleType)):
                self._add_all("of", (owner, getattr(value, "__wrapped__", None)))
        elif isinstance(value, nn.Module):
            self._add_module(value)
        else:
            slots = {slot for kind in type(value).__mro__ for slot in _slots(kind)}
            held = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
            if not slots and not hasattr(value, "__dict__"):  # of no class that is written in Python
                self._miss(value)
                return
            self.add(type(value))
            self._add_all("object", (self._constants(type(value)) | held | getattr(value, "__dict__", {}),))

    def _add_module(self, value: nn.Module) -> None:
        for name, one in value.named_modules():
            self._say("module", name)
            self.add(type(one))
            options = {key: kept for key, kept in vars(one).items() if not (key.startswith("_") or key == "training")}
            self._add_all("options", (options,))
        for name, weight in (*held_parameters(value).items(), *held_buffers(value).items()):
            self._say("weight", name)
            self.add(weight)


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__weakref__", "__dict__"))


def _names(code: types.CodeType) -> set[str]:
    """Of globals (and attributes) that a function and those inside it name."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
