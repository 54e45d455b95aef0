"""Changing the class of a clone without changing what it is an instance of.

``swap_class(module, mixin)`` makes the module an instance of a subclass ``(mixin, type(module))``, which
pickles and deep-copies although no import path leads to it.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

from torch import nn


class Swapped:
    """Base of the mixins: rebuilds the dynamic class when a copy is unpickled."""

    _mixin: type
    _base: type[nn.Module]
    #: Whether each module has a class, and so code objects, of its own. The compiler keeps with a code object that it
    #: could not be traced, and how often it was compiled; of one policy, that should not be held against the next.
    _own_class = False

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self._mixin, self._base), self.__getstate__()


#: For each class the mixed ones that are in use. They hold the class, and it may hold large things: a policy's class
#: that was defined in a function goes when its last policy does.
_mixed: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[type, type]] = weakref.WeakKeyDictionary()


def mixed_class(mixin: type[Swapped], base: type[nn.Module]) -> type:
    """A subclass of ``base`` with the behaviour of ``mixin``: the same one while it is in use, or a new one."""
    known = _mixed.setdefault(base, weakref.WeakValueDictionary())
    found = known.get(mixin)
    if found is not None and not mixin._own_class:
        return found
    namespace = {"_mixin": mixin, "_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    namespace |= mixin._namespace(base) if hasattr(mixin, "_namespace") else {}
    made = type(f"{mixin.__name__.removesuffix('Mixin')}{base.__name__}", (mixin, base), namespace)
    return made if mixin._own_class else known.setdefault(mixin, made)


def own_code(function: types.FunctionType) -> types.FunctionType:
    """The function with a code object that no other function shares."""
    function.__code__ = function.__code__.replace()
    return function


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Make a module an instance of ``mixed_class(mixin, type(module))``, in place."""
    module.__class__ = mixed_class(mixin, type(module))


def _rebuild(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    cls = mixed_class(mixin, base)
    return cls.__new__(cls)
