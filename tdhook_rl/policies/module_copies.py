"""Copies of the modules of libraries, as ``copy.deepcopy`` makes them, without its look at each number and each word.

The modules of most policies are of torch, tensordict and TorchRL, and hold little else beside their weights.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import sys
from functools import cache
from typing import Any, TypeVar

from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl.internals.dynamo_names import is_compiled

M = TypeVar("M", bound=nn.Module)

_ATOMS = frozenset((bool, int, float, str, type(None)))
_EMPTIED = frozenset((dict, collections.OrderedDict, set))
_LIBRARIES = ("torch.nn.modules.", "tensordict.nn.", "torchrl.modules.")
#: How else a class may say how its objects are copied, beside the two that follow.
_COPIED_BY = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
#: The attributes as they are; what sets them adds those that older versions had not.
_STATES = (nn.Module.__getstate__, TensorDictModule.__getstate__)  # type: ignore[attr-defined]


def _is_known(kind: type) -> bool:
    """Whether a class is of a library, and its objects are copied attribute by attribute."""
    if not kind.__module__.startswith(_LIBRARIES) or vars(sys.modules[kind.__module__]).get(kind.__name__) is not kind:
        return False
    return _is_usual(kind)


@cache
def _is_usual(kind: type) -> bool:
    usual = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPIED_BY)
    return usual and getattr(kind, "__getstate__", None) in _STATES


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a layer of torch that holds nothing but numbers, words and weights that are trained.

    What else a policy may hold (state, functions, views of arrays) need not be looked for in it.
    """
    kind, own = module.__class__, module.__dict__
    if not _is_known(kind) or not kind.__module__.startswith(_LIBRARIES[0]):
        return False
    weights = own["_parameters"]
    for value in own.values():
        held = value.__class__
        if held in _ATOMS or (held in _EMPTIED and not value):
            continue
        if held is tuple:
            if not all(one.__class__ in _ATOMS for one in value):
                return False
        elif value is not weights or not all(one is None or one.requires_grad for one in weights.values()):
            return False
    return True


def deep_copy_of(module: M, memo: dict[int, Any]) -> M:
    """What ``copy.deepcopy(module, memo)`` returns."""
    known = memo.get(id(module))
    if known is not None:
        return known
    own = module.__dict__
    # What a module was compiled into is left out, and the function in a TensorDictModule is pickled.
    if not _is_known(module.__class__) or "module" in own or is_compiled(module):
        for one in module._modules.values():  # a policy of the user's own is mostly made of theirs
            if one is not None and _is_known(one.__class__):
                deep_copy_of(one, memo)
        return copy.deepcopy(module, memo)
    made = copyreg.__newobj__(module.__class__)  # type: ignore[attr-defined]
    memo[id(module)] = made
    entries = made.__dict__
    for name, value in own.items():
        kind = value.__class__
        if kind in _ATOMS:
            entries[name] = value
        elif kind in _EMPTIED and not value:
            entries[name] = memo.setdefault(id(value), kind())
        elif kind is dict and name == "_modules":
            entries[name] = {key: None if one is None else deep_copy_of(one, memo) for key, one in value.items()}
        elif isinstance(value, nn.Module):
            entries[name] = deep_copy_of(value, memo)
        else:
            entries[name] = copy.deepcopy(value, memo)
    return made
