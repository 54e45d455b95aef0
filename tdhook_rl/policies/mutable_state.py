"""The mutable things that a policy holds, besides its parameters: what a forward can write.

Buffers, tensors in plain attributes, counters, lists, dictionaries, helper objects, generators. Each is read, compared
and written by the way of its kind; :func:`find_state` finds them.
"""

from __future__ import annotations

import array
import collections
import copy
import enum
import functools
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.internals.tensordict_names import store_of
from tdhook_rl.policies.memory import read_tensor, same_values, share_memory, write_tensor
from tdhook_rl.sites.known import own_class, user_code
from tdhook_rl.sites.root_hooks import hooks_of

#: Attributes of a module that are torch's own business.
INTERNAL = frozenset(vars(nn.Module()))
#: Whose objects are left alone: they are shared by all of a process, or no state of a forward.
_FOREIGN = ("tdhook_rl", "logging", "threading", "multiprocessing", "weakref", "io", "_io", "torchrl")
#: How many objects are looked at; a policy that holds more (a data set, say) is known as far as that.
AT_MOST = 20_000

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, np.dtype, np.generic, torch.dtype, torch.device, torch.Size, torch.layout, enum.Enum,
    nn.Parameter, TensorDictParams,
)  # fmt: skip
#: The most common of them, which are told sooner.
_SURE = frozenset((type(None), bool, int, float, str))
#: What holds nothing but its items.
_WITHOUT_ATTRIBUTES = frozenset((dict, list, tuple, set, collections.deque))


class Kind(NamedTuple):
    """How things of one kind are handled.

    Attributes:
        read: the content as it is now, in a form that stays.
        same: whether the content is still that one.
        write: put a content back.
    """

    read: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    write: Callable[[Any, Any], None]


class StatePart(NamedTuple):
    """One mutable thing: where it is, and how it is handled."""

    path: str
    owner: str  # the class of the module it belongs to
    kind: Kind
    thing: Any


class MutableState(NamedTuple):
    """What a policy holds: the mutable things, and the tensors in them with their paths and their owners' classes."""

    things: list[StatePart]
    tensors: list[tuple[Tensor, str, str]]
    shared: list[Any]  # arrays, and tensors among the things, that are views of one memory, or of a parameter's


def find_state(
    modules: list[tuple[str, nn.Module]],
    things: Sequence[StatePart] = (),
    values: Sequence[tuple[Any, str, str]] = (),
    trained: Sequence[Tensor] = (),
) -> MutableState:
    """Everything mutable that these modules hold, each thing once.

    Args:
        modules: with their paths; what they hold besides registered submodules is found from there.
        things: others.
        values: in which there may be others, with their paths and the class that they belong to.
        trained: parameters of other modules, of which there may be views.
    """
    found = MutableState([*things], [], [])
    seen: set[int] = set()
    waiting: collections.deque[tuple[Any, str, str]] = collections.deque()

    def add(kind: Kind, thing: Any, path: str, owner: str) -> None:
        found.things.append(StatePart(path, owner, kind, thing))

    def visit(value: Any, path: str, owner: str) -> None:
        if value.__class__ in _SURE or isinstance(value, _ATOMS) or id(value) in seen:
            return
        if not isinstance(value, nn.Module) and _is_foreign(type(value).__module__):
            return
        seen.add(id(value))
        waiting.append((value, path, owner))

    for path, module in modules:
        visit(module, path, own_class(module).__name__)
    for value, path, owner in values:
        visit(value, path, owner)
    while waiting and len(seen) < AT_MOST:
        value, path, owner = waiting.popleft()
        if isinstance(value, Tensor):
            found.tensors.append((value, path, owner))
        elif isinstance(value, nn.Module):
            for inner in _of_module(value, path, own_class(value).__name__, add, found):
                visit(*inner)
        else:
            for inner_path, inner_value in _of_object(value, path, owner, add):
                visit(inner_value, inner_path, owner)
    _tell_shared(found, [module for _, module in modules if isinstance(module, nn.Module)], trained)
    return found


def _tell_shared(found: MutableState, modules: list[nn.Module], others: Sequence[Tensor]) -> None:
    """Views of what is written in place, an array or a trained parameter, are so too: a copy would not see it."""
    arrays = [one.thing for one in found.things if isinstance(one.thing, np.ndarray)]
    tensors = [tensor for tensor, _, _ in found.tensors if tensor.grad_fn is None]
    # Not by `parameters`, which some modules override without `recurse`, or with groups for an optimiser.
    held = (one for module in modules for one in module._parameters.values() if one is not None)
    trained = [*(one for one in held if one.requires_grad), *others]
    found.shared.extend(share_memory(arrays, tensors, trained))
    shared = {id(one) for one in found.shared}
    for tensor, path, owner in found.tensors:
        if id(tensor) in shared:
            found.things.append(StatePart(path, owner, _OVER_ARRAY, tensor))
    found.tensors[:] = [one for one in found.tensors if id(one[0]) not in shared]


def _is_foreign(home: str) -> bool:
    return home.partition(".")[0] in _FOREIGN and not home.startswith("torchrl.modules.distributions")


Add = Callable[[Kind, Any, str, str], None]


def _of_module(
    module: nn.Module, path: str, owner: str, add: Add, found: MutableState
) -> Iterator[tuple[Any, str, str]]:
    dot = f"{path}." if path else ""
    attributes = vars(module)
    add(_MODULE, attributes, path, owner)
    # What no optimiser changes, a forward may: a running mean that is kept as a parameter.
    if any(value is not None and not value.requires_grad for value in module._parameters.values()):
        add(_MAPPING, module._parameters, path, owner)
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                found.tensors.append((parameter, f"{dot}{name}", owner))
    add(_MAPPING, module._buffers, path, owner)
    for name, value in module._buffers.items():
        yield value, f"{dot}{name}", owner
    for name, value in attributes.items():
        if name not in INTERNAL and value.__class__ not in _SURE and not name.startswith("_hooked"):
            if isinstance(value, nn.Module):  # kept beside the registered ones: it is what it holds
                for inner_path, inner in value.named_modules():
                    yield inner, f"{dot}{name}{'.' if inner_path else ''}{inner_path}", own_class(inner).__name__
            else:
                yield value, f"{dot}{name}", owner
    for hook in hooks_of(module):
        code = user_code(hook)
        thing = hook if code is None else code
        yield thing, f"{dot}{type(thing).__name__}", owner


def _of_object(value: Any, path: str, owner: str, add: Add) -> Iterator[tuple[str, Any]]:
    """What an object that is no module holds, with the paths; the object itself is added if it can change."""
    kind = kind_of(value)
    if kind is not None:
        add(kind, value, path, owner)
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, TensorDictBase):
        if type(value) is TensorDict and not value.is_locked:
            add(_MAPPING, store_of(value), path, owner)
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
        return
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
    elif isinstance(value, functools.partial):
        yield from ((path, item) for item in (value.func, *value.args, *value.keywords.values()))
    if type(value) in _WITHOUT_ATTRIBUTES:
        return
    if kind is None or isinstance(value, (dict, list, tuple, collections.deque)):
        own = getattr(value, "__dict__", None)
        if type(own) is dict:  # without any, too: what has its defaults in the class is given its own later
            add(_MAPPING, own, path, owner)
            yield from ((f"{path}.{name}", item) for name, item in own.items())
        names = [name for base in type(value).__mro__ for name in _slots(base)]
        if names:
            add(_SLOTS, (value, names), path, owner)
            yield from ((f"{path}.{name}", getattr(value, name)) for name in names if hasattr(value, name))


def _slots(base: type) -> list[str]:
    names = vars(base).get("__slots__", ())
    if base.__module__ in ("builtins", "collections", "typing", "abc"):
        return []
    names = [names] if isinstance(names, str) else names
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def with_tensors(value: Any, new: dict[int, Tensor]) -> Any:
    """A value that is a tensor, or a tuple with tensors, with others in their place, by the ``id`` of the old ones."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple):
        items = [with_tensors(item, new) for item in value]
        if all(item is old for item, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


# ---------------------------------------------------------------------- kinds


def _equal(thing: Any, content: Any) -> bool:
    # Containers look at identity first, so this is quick where nothing has changed.
    try:
        return bool(thing == content)
    except Exception:  # two different tensors or arrays, which have no one answer
        return False


def _write_mapping(thing: dict[Any, Any], content: dict[Any, Any]) -> None:
    for key in [key for key in thing if key not in content]:
        del thing[key]
    for key, value in content.items():
        if key not in thing or thing[key] is not value:
            thing[key] = value
    if list(thing) != list(content):
        for key, value in content.items():
            del thing[key]
            thing[key] = value


def _write_module(thing: dict[str, Any], content: dict[str, Any]) -> None:
    for key in [key for key in thing if key not in content and key not in INTERNAL]:
        del thing[key]
    for key, value in content.items():
        if key not in INTERNAL and thing.get(key, thing) is not value:
            thing[key] = value


def _write_list(thing: Any, content: Any) -> None:
    thing[:] = content


def _write_others(thing: Any, content: Any) -> None:
    thing.clear()
    thing.extend(content) if isinstance(thing, collections.deque) else thing.update(content)


def _read_slots(thing: tuple[Any, list[str]]) -> dict[str, Any]:
    return {name: getattr(thing[0], name) for name in thing[1] if hasattr(thing[0], name)}


def _write_slots(thing: tuple[Any, list[str]], content: dict[str, Any]) -> None:
    for name, value in content.items():
        if getattr(thing[0], name, thing) is not value:
            setattr(thing[0], name, value)


def _write_array(thing: Any, content: Any) -> None:
    thing[...] = content


_OVER_ARRAY = Kind(read_tensor, same_values, write_tensor)
_MAPPING = Kind(dict, _equal, _write_mapping)
_MODULE = Kind(dict, _equal, _write_module)
_SLOTS = Kind(_read_slots, lambda thing, content: _equal(_read_slots(thing), content), _write_slots)
_KINDS: list[tuple[Any, Kind]] = [
    (dict, _MAPPING),
    (list, Kind(list, _equal, _write_list)),
    (collections.deque, Kind(copy.copy, _equal, _write_others)),
    (set, Kind(set, _equal, _write_others)),
    (np.ndarray, Kind(np.copy, lambda a, b: a.shape == b.shape and a.tobytes() == b.tobytes(), _write_array)),
    (array.array, Kind(copy.copy, _equal, _write_list)),
    (bytearray, Kind(bytes, _equal, _write_list)),
    (
        torch.Generator,
        Kind(lambda g: g.get_state(), lambda g, s: torch.equal(g.get_state(), s), lambda g, s: g.set_state(s)),
    ),
    (
        np.random.Generator,
        Kind(
            lambda g: copy.deepcopy(g.bit_generator.state),
            lambda g, s: repr(g.bit_generator.state) == repr(s),
            lambda g, s: setattr(g.bit_generator, "state", s),
        ),
    ),
    (
        np.random.RandomState,
        Kind(
            lambda g: g.get_state(),
            lambda g, s: bool((g.get_state()[1] == s[1]).all()) and g.get_state()[2:] == s[2:],
            lambda g, s: g.set_state(s),
        ),
    ),
    (random.Random, Kind(lambda g: g.getstate(), lambda g, s: g.getstate() == s, lambda g, s: g.setstate(s))),
]


def kind_of(value: Any) -> Kind | None:
    """How a thing is handled; ``None`` for what has no content of its own."""
    return next((kind for kinds, kind in _KINDS if isinstance(value, kinds)), None)
