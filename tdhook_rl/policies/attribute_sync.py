"""Attributes that the user sets on a policy while it is hooked are handed on to its clone.

Such as a temperature, an epsilon or the flag of a merged adapter. What a forward writes (counters, hidden states)
belongs to the side on which it ran, and so do ``training`` and hooks, of which it is said where they have come apart. A
module that was replaced, added or removed cannot be followed.
"""

from __future__ import annotations

import copy
import dis
import types
import weakref
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.errors import TieError, warn
from tdhook_rl.internals.torch_names import hooks_made
from tdhook_rl.policies.mutable_state import INTERNAL, StatePart, find_state
from tdhook_rl.policies.rebinding import runs_a_module
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.listed import modules, named_modules

_ABSENT = object()

#: What hooks of a forward are kept in.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

#: What is said of a module and never computed with: weights have their own shapes.
_PRINTED: dict[type, tuple[str, ...]] = {nn.Linear: ("in_features", "out_features")}

#: Methods that change what they belong to.
_CHANGING = frozenset(
    ("append", "appendleft", "extend", "insert", "pop", "popleft", "remove", "clear", "update", "setdefault", "add")
)


class AttributeSync:
    """Compares what the modules of a policy hold with what they held, and hands changes on to its clone."""

    def __init__(self, original: nn.Module, clone: nn.Module) -> None:
        pairs = [
            (path, child, own)
            for (path, child), own in zip(named_modules(original), modules(clone), strict=True)
            if child is not own and not isinstance(child, TensorDictParams)
        ]
        self._paths = [path for path, _, _ in pairs]
        self._classes = [own_class(child) for _, child, _ in pairs]
        self._theirs = [vars(child) for _, child, _ in pairs]
        self._own = [vars(own) for _, _, own in pairs]
        self._then = [dict(theirs) for theirs in self._theirs]
        self._note_values()
        self._given = [dict(own) for own in self._own]  # what the clone has without a forward of its own
        self._children = [
            (path, child._modules, dict(child._modules))
            for path, child, _ in pairs
            if child._modules or not own_class(child).__module__.startswith("torch.nn.modules.") or _may_hold(child)
        ]
        self._inside = {
            (index, name): inside
            for index, (theirs, own) in enumerate(zip(self._theirs, self._own, strict=True))
            if self._is_users(index)
            for name in theirs
            if (inside := _inside(name, theirs[name], own.get(name))) is not None
        }
        self._note_hooks(
            [(path, child[k]) for path, child in zip(self._paths, self._theirs, strict=True) for k in _HOOKS]
        )
        self._told_mode = False
        #: Whether a forward of the clone has shown what it writes.
        self.ran = False
        #: How often something was handed on.
        self.edits = 0

    def changed(self) -> bool:
        """Whether there may be something to hand on or to tell of.

        Asked at every call, when what it looks at has long left the processor's caches, so it looks at little: a step
        of a small policy takes a tenth more if it looks at all that every module holds.
        """
        if hooks_made() != self._hooks_made or self._changed():
            return True
        if self._inside and any(inside.changed() for inside in self._inside.values()):
            return True
        return bool(self._hooks) and any(held != then for _, held, then in self._hooks)

    def run(self) -> None:
        """Hand on what has changed.

        Raises:
            TieError: if a module was replaced, added or removed.
        """
        if self._changed():
            self._follow_attributes()
        if self._inside:
            for (index, name), inside in list(self._inside.items()):
                if inside.changed():
                    self._hand_on(index, name)
        self._tell_hooks()

    def _is_users(self, index: int) -> bool:
        return self._classes[index].__module__.partition(".")[0] not in ("torch", "tensordict", "torchrl")

    def _changed(self) -> bool:
        """Whether an attribute was set, removed or added, or a module replaced."""
        if [*map(len, self._theirs)] != self._counts:
            return True
        try:
            for _, children, held in self._children:
                if children != held:
                    return True
            for theirs, read, then in self._values:
                if read(theirs) != then:
                    return True
        except Exception:  # one is gone, or two different tensors have no one answer
            return True
        return False

    def _note_values(self) -> None:
        """Note of each module how many attributes it has, and the values of those that are not torch's own."""
        self._counts = [len(then) for then in self._then]
        self._values: list[tuple[dict[str, Any], Callable[[Any], Any], Any]] = []
        for index, (theirs, then) in enumerate(zip(self._theirs, self._then, strict=True)):
            names = [
                name for name in then if name not in INTERNAL and name not in _PRINTED.get(self._classes[index], ())
            ]
            # Of two names or more it makes a tuple, which compares by identity first. In the forward of a class of
            # torch without any, such as Sequential, the mode does not count.
            if names or self._is_users(index):
                read = itemgetter("training", *names)
                self._values.append((theirs, read, read(then)))

    def _follow_attributes(self) -> None:
        for path, children, then in self._children:
            for name in {**children, **then}:
                if children.get(name) is not then.get(name):
                    raise TieError(_replaced(f"{path}.{name}" if path else name, then.get(name), children.get(name)))
        for index, (theirs, then) in enumerate(zip(self._theirs, self._then, strict=True)):
            for name in {**theirs, **then}:
                if name not in INTERNAL and not _equal(theirs.get(name, _ABSENT), then.get(name, _ABSENT)):
                    self._hand_on(index, name)
            self._then[index] = dict(theirs)
        self._note_values()
        self._tell_mode()

    def _tell_mode(self) -> None:
        """Warn, once, where the mode of a module inside is another on either side."""
        if self._told_mode or self._theirs[0]["training"] is not self._own[0]["training"]:  # that is told of the whole
            return
        for path, theirs, own in zip(self._paths, self._theirs, self._own, strict=True):
            if theirs["training"] is not own["training"]:
                self._told_mode = True
                warn(
                    f"the module {path!r} of the user's policy is in {_mode(theirs)} mode and the hooked one in "
                    f"{_mode(own)} mode: train() and eval() act only where called"
                )
                return

    def _note_hooks(self, hooks: list[tuple[str, dict[int, Any]]]) -> None:
        self._hooks_made = hooks_made()
        self._hooks = [(path, held, dict(held)) for path, held in hooks if held]
        self._unhooked = [(path, held) for path, held in hooks if not held]

    def _tell_hooks(self) -> None:
        """Warn of hooks that were added or removed, of each change once."""
        known = [*self._hooks, *((path, held, {}) for path, held in self._unhooked)]
        changed = [(path, held, then) for path, held, then in known if held != then]
        self._note_hooks([(path, held) for path, held, _ in known])
        for path, held, then in changed:
            added = any(key not in then for key in held)
            warn(
                f"a forward hook was {'added' if added else 'removed'} at {path!r} of the user's policy since it was "
                f"prepared, and the hooked policy runs {'without it' if added else 'it still'}: leave the context and "
                "enter it again"
            )

    def _hand_on(self, index: int, name: str) -> None:
        theirs, own, given = self._theirs[index], self._own[index], self._given[index]
        value = theirs.get(name, _ABSENT)
        if isinstance(value, nn.Module) or isinstance(given.get(name), nn.Module):
            path = f"{self._paths[index]}.{name}" if self._paths[index] else name
            raise TieError(_replaced(path, given.get(name), None if value is _ABSENT else value))
        if runs_a_module(value):
            path = f"{self._paths[index]}.{name}" if self._paths[index] else name
            raise TieError(
                f"{path!r} of the user's policy was set to a function that runs modules of its own since it was "
                "prepared, which have no hooks: leave the context and enter it again"
            )
        inside = self._inside.pop((index, name), None)
        if not self._written_by_forward(index, name, inside):
            self.edits += 1
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = _copy(value)
            given[name] = own.get(name, _ABSENT)
        if (inside := _inside(name, value, own.get(name))) is not None:
            self._inside[index, name] = inside

    def _written_by_forward(self, index: int, name: str, inside: _Inside | None) -> bool:
        """Whether a forward has changed an attribute, and not its owner: the clone's forward does so too."""
        own, given = self._own[index], self._given[index]
        if not _equal(own.get(name, _ABSENT), given.get(name, _ABSENT)):
            return True
        if inside is not None and inside.own_changed():
            return True
        return not self.ran and any(name in stored_names(kind) for kind in set(self._classes))


class _Inside:
    """The contents of an attribute that can change without being set, in the user's policy and in the clone."""

    def __init__(self, theirs: Any, own: Any) -> None:
        self._theirs, self._own = _things(theirs), _things(own)

    def __bool__(self) -> bool:
        return bool(self._theirs)

    def changed(self) -> bool:
        return any(not one.kind.same(one.thing, then) for one, then in self._theirs)

    def own_changed(self) -> bool:
        return any(not one.kind.same(one.thing, then) for one, then in self._own)


def _things(value: Any) -> list[tuple[StatePart, Any]]:
    return [(one, one.kind.read(one.thing)) for one in find_state([("", value)]).things]


def _inside(name: str, theirs: Any, own: Any) -> _Inside | None:
    """What can change in an attribute without its being set; ``None`` if there is nothing."""
    if name in INTERNAL or name.endswith("_keys") or isinstance(theirs, (Tensor, nn.Module)):
        return None
    return _Inside(theirs, own) or None


def _may_hold(module: nn.Module) -> bool:
    """Whether a module of torch that holds no others is made to hold some: an empty ``Sequential``, a bare module."""
    return own_class(module).__module__ in (nn.Sequential.__module__, nn.Module.__module__)


def _mode(attributes: dict[str, Any]) -> str:
    return "train" if attributes["training"] else "eval"


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    try:
        return bool(one == other)
    except Exception:
        return False


def _copy(value: Any) -> Any:
    """A copy for the clone, over the same tensors."""
    memo = {id(tensor): tensor for tensor, _, _ in find_state([("", value)]).tensors}
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # what does not copy is shared
        return value


def _replaced(path: str, then: Any, now: Any) -> str:
    what = "removed" if now is None else "added" if then is None else "replaced"
    return (
        f"the module {path!r} of the user's policy was {what} since it was prepared "
        f"({type(then).__name__} then, {type(now).__name__} now), and the hooked policy still has the layers from "
        "then: leave the context and enter it again"
    )


#: What was read of classes; it keeps none of them, which may be local ones that hold a lot.
_STORED: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def stored_names(kind: type) -> frozenset[str]:
    """The attributes that the forward of a class sets or changes, itself or in methods that it calls, as it reads."""
    known = _STORED.get(kind)
    if known is None:
        known = _STORED[kind] = _stored_names(kind)
    return known


def _stored_names(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for steps in forward_code(kind):
        for place, step in enumerate(steps):
            before = [one.argval for one in steps[max(0, place - 6) : place] if one.opname == "LOAD_ATTR"]
            if step.opname == "STORE_ATTR":
                found.add(step.argval)
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                found.update(before)
            elif step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in _CHANGING:
                found.update(before[-1:])
    return frozenset(found)


def forward_code(kind: type) -> Iterator[list[dis.Instruction]]:
    """The instructions of the forward of a class, and of the methods that it calls."""
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        function = getattr(kind, name, None)
        function = getattr(function, "__wrapped__", function)
        if name in seen or not isinstance(function, (types.FunctionType, types.MethodType)):
            continue
        seen.add(name)
        if name != "forward" and hasattr(nn.Module, name):
            continue
        yield list(dis.get_instructions(function))
        waiting += function.__code__.co_names
