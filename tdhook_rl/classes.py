"""Changing the class of a clone without changing what it is an instance of.

``swap_class(module, mixin)`` makes the module an instance of a cached subclass ``(mixin, type(module))``,
which pickles and deep-copies although no import path leads to it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ["Swapped", "mixed_class", "swap_class"]


class Swapped:
    """Base of the mixins: rebuilds the dynamic class when a copy is unpickled."""

    _mixin: type
    _base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self._mixin, self._base), self.__getstate__()


@functools.cache
def mixed_class(mixin: type[Swapped], base: type[nn.Module]) -> type:
    """The subclass of ``base`` with the behaviour of ``mixin``; the same object at every call."""
    namespace = {"_mixin": mixin, "_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    namespace |= mixin._namespace(base) if hasattr(mixin, "_namespace") else {}
    return type(f"{mixin.__name__.removesuffix('Mixin')}{base.__name__}", (mixin, base), namespace)


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Make a module an instance of ``mixed_class(mixin, type(module))``, in place."""
    module.__class__ = mixed_class(mixin, type(module))


def _rebuild(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    cls = mixed_class(mixin, base)
    return cls.__new__(cls)
