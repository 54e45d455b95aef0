"""The tied clone: fresh module objects that hold the very same tensors.

Hooks, switches and training flags then belong to the clone alone, while an optimiser step on the user's
policy is seen by the clone at once and weight sync finds the structure it knows.
"""

from __future__ import annotations

import collections
import copy
import threading
import weakref
from collections.abc import Iterable, Mapping
from operator import call, is_
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.errors import PreparationError, TieError, warn
from tdhook_rl.internals.dynamo_names import is_compiled
from tdhook_rl.internals.tensordict_names import params_with
from tdhook_rl.policies.attribute_sync import AttributeSync
from tdhook_rl.policies.module_copies import is_plain
from tdhook_rl.policies.mutable_state import INTERNAL, MutableState, find_state
from tdhook_rl.policies.rebinding import deep_copy
from tdhook_rl.sites.listed import modules, named_modules, require_listed

M = TypeVar("M", bound=nn.Module)

#: What modules hold of torch's own, mostly with nothing in it; and other classes that are no tensor and no generator.
_EMPTIED = frozenset((dict, collections.OrderedDict, set))
_SIMPLE = _EMPTIED | {bool, int, float, str, type(None), list, tuple}
#: How deep the attribute that does not copy is looked for.
DEEP = 6


def tied_clone(module: M) -> M:
    """A structural deep copy of a module that shares its parameters, buffers and generators.

    Raises:
        PreparationError: for compiled, lazy or scripted modules, and for modules that do not deep-copy.
        TieError: if a parameter or buffer of the copy is not the same object as the original's.
    """
    require_listed(module)
    _refuse_uncopyable(module)
    memo: dict[int, Any] = {}
    kept: list[Any] = []  # deepcopy returns memo[id(x)], so whatever is listed here is shared instead of copied
    tensordicts: list[TensorDictBase] = []
    others: list[tuple[str, nn.Module]] = []  # in which more may be held than weights and numbers
    trained: list[Tensor | None] = []
    for path, child in named_modules(module):
        if is_plain(child):
            trained += child._parameters.values()
            continue
        others.append((path, child))
        if isinstance(child, TensorDictParams):
            kept += child, *child.parameters(recurse=False), *child.buffers(recurse=False)
        kept += child._parameters.values()
        kept += child._buffers.values()
        for value in vars(child).values():
            kind = value.__class__
            if kind in _SIMPLE:
                if not value and kind in _EMPTIED:  # most are: deepcopy takes long to do the same
                    memo.setdefault(id(value), kind())
            elif isinstance(value, (Tensor, torch.Generator)):
                # Plain tensor attributes and generators are state of the policy as well.
                kept.append(value)
            elif isinstance(value, TensorDictBase):
                tensordicts.append(value)
    kept += trained
    held = find_state(others, trained=[one for one in trained if one is not None])
    # Those in containers too, which their owner may write to in place (a running mean in a dictionary), and views.
    kept += held.shared
    kept += [tensor for tensor, _, _ in held.tensors if tensor.grad_fn is None]
    memo.update((id(item), item) for item in kept)
    for value in tensordicts:
        if id(value) not in memo:
            memo[id(value)] = value.clone(recurse=False)  # a TensorDict copies its tensors past the memo
    _detach_graphs(held, memo)
    seeds = dict(memo)
    try:
        clone = deep_copy(module, memo)
    except PreparationError:
        raise
    except Exception as error:
        where = f" at {lost!r}" if (lost := _uncopyable(module, seeds)) else ""
        raise PreparationError(
            f"{type(module).__name__} cannot be copied{where} ({type(error).__name__}: {error}). A hooked policy is a "
            "copy of the modules over the same tensors; remove what does not deep-copy (locks, open files, "
            "non-leaf tensors), or build and prepare the policy inside `policy_factory`"
        ) from error
    tensors, own = named_tensors(module), named_tensors(clone)
    untied = [name for name, tensor in tensors.items() if own.get(name) is not tensor]
    if untied:
        raise TieError(
            f"the copy of {type(module).__name__} does not share {untied[0]!r} (and {len(untied) - 1} more) with the "
            "original: a module with its own __deepcopy__ duplicates its tensors"
        )
    return clone


def detach_graphs(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy with this memo hold, of tensors that a forward with gradients has left, copies without a graph.

    No tensor with a graph can be deep-copied, in whatever container it is kept.
    """
    _detach_graphs(find_state(named_modules(module)), memo)


def _detach_graphs(held: MutableState, memo: dict[int, Any]) -> None:
    for tensor, _, _ in held.tensors:
        if tensor.grad_fn is not None and id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()


class Tie:
    """Watches that the user's policy still holds the tensors that its clone holds.

    ``load_state_dict(assign=True)`` and ``.to(dtype)`` put new tensors into the original, after which the
    clone would go on with the old ones in silence.
    """

    def __init__(self, original: nn.Module, clone: nn.Module) -> None:
        self._original = weakref.ref(original)
        # A forward may replace a buffer: where the clone's does, the user's policy goes on with the new one as well.
        self._buffers = [
            (own._buffers, child._buffers, f"{path}." if path else "")
            for (path, child), own in zip(named_modules(original), modules(clone), strict=True)
            if child._buffers and child._buffers is not own._buffers
        ]
        self._renewed: set[str] = set()
        self._attribute_sync = AttributeSync(original, clone)
        self._entries = [
            (store, name, tensor, f"{prefix}.{name}" if prefix else name)
            for prefix, child in named_modules(original)
            for store in (child._parameters, child._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._note_entries()
        #: Modules that mirror in buffers what somebody else goes on changing.
        self._mirrors: list[Any] = [one for one in modules(clone) if hasattr(type(one), "follow_source")]
        self._modes = vars(original), vars(clone)
        self._parameters = [tensor for *_, tensor, _ in self._entries if isinstance(tensor, nn.Parameter)]
        self._warned = False
        self._edited: list[tuple[Tensor, int, str]] = []
        self._replaced: set[int] = set()

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Warn when the user changes tensors of which the clone was given an edited copy."""
        given = {id(tensor): tensor.is_inference() for tensor in tensors}
        self._replaced |= given.keys()
        self._edited += [
            (tensor, tensor._version, path)
            for *_, tensor, path in self._entries
            if given.get(id(tensor), True) is False  # an inference tensor has no version
        ]

    def holds_buffers(self) -> bool:
        """Whether the clone holds the buffers of the original; it does not while a loss lends it others."""
        return not self._buffers or all(mapping_is(own, theirs) for own, theirs, _ in self._buffers)

    def hand_on_buffers(self) -> None:
        """After a forward of the clone that started with the original's buffers: give the original the new ones."""
        self._attribute_sync.ran = True
        for own, theirs, dot in self._buffers:
            if mapping_is(own, theirs):
                continue
            for name, tensor in own.items():
                if theirs.get(name) is not tensor:
                    self._renewed.add(f"{dot}{name}")
                    theirs[name] = tensor
                    self._entries = [
                        (store, key, tensor if store is theirs and key == name else held, path)
                        for store, key, held, path in self._entries
                    ]
                    self._note_entries()

    def _take_buffers(self) -> None:
        """Give the clone what a forward of the original has put in the place of buffers that forwards replace."""
        for own, theirs, dot in self._buffers:
            for name, tensor in theirs.items():
                if f"{dot}{name}" in self._renewed and own.get(name) is not tensor and tensor is not None:
                    own[name] = tensor
        self._entries = [
            (store, name, store.get(name) if path in self._renewed else held, path)
            for store, name, held, path in self._entries
        ]
        self._note_entries()

    def _note_entries(self) -> None:
        """What :meth:`_unchanged` compares, side by side in memory."""
        stores = {id(store): store.get for store, *_ in self._entries}
        self._gets = [stores[id(store)] for store, *_ in self._entries]
        self._names = [name for _, name, *_ in self._entries]
        self._held = [tensor for *_, tensor, _ in self._entries]

    def _unchanged(self) -> bool:
        """Whether nothing is to be said of the original or handed on, see :meth:`AttributeSync.changed`."""
        if self._renewed or self._edited or not all(map(is_, map(call, self._gets, self._names), self._held)):
            return False
        theirs, own = self._modes
        return (theirs["training"] is own["training"] or self._warned) and not self._attribute_sync.changed()

    def check(self, clone: nn.Module) -> None:
        """Raise :class:`TieError` if the original was given other tensors; warn if train/eval differ."""
        for one in self._mirrors:
            one.follow_source()
        if self._unchanged():
            return
        # While a loss runs, another thread may see the original with target weights swapped in.
        if threading.get_ident() != threading.main_thread().ident:
            return
        if self._renewed:
            self._take_buffers()
        self.require_held()
        self._attribute_sync.run()
        self._warn(clone)

    @property
    def edits(self) -> int:
        """How often attributes that the user has set were handed on to the clone."""
        return self._attribute_sync.edits

    def require_held(self) -> None:
        """Raise :class:`TieError` if the original was given other tensors."""
        if (path := self.untied()) is not None:
            raise TieError(
                f"the user's policy holds another tensor at {path!r} than when it was prepared "
                "(load_state_dict(assign=True) and .to(...) replace tensors): prepare it again"
            )

    def _warn(self, clone: nn.Module) -> None:
        if (path := self.outdated()) is not None:
            self._edited = []
            warn(
                f"the user's policy has changed at {path!r} since it was prepared, and the hooked policy has an "
                "edited copy from then: leave the context and enter it again to edit the new weights"
            )
        original = self._original()
        if original is not None and original.training is not clone.training and not self._warned:
            self._warned = True
            warn(
                f"the user's policy is in {'train' if original.training else 'eval'} mode and the hooked one in "
                f"{'train' if clone.training else 'eval'} mode: train() and eval() act only where called"
            )

    def untied(self) -> str | None:
        """Where the original holds another tensor than when it was prepared."""
        for store, name, tensor, path in self._entries:
            if store.get(name) is not tensor:
                return path
        return None

    def outdated(self) -> str | None:
        """Where the user changed a tensor of which the clone has an edited copy."""
        for tensor, version, path in self._edited:
            if tensor._version != version:
                return path
        return None

    def stray(self, root: nn.Module) -> str | None:
        """Where the clone, from the module that paths start at, holds a tensor that is not the original's."""
        found = named_tensors(root)
        return next(
            (
                path
                for *_, tensor, path in self._entries
                if found.get(path) is not tensor and id(tensor) not in self._replaced
            ),
            None,
        )

    def original(self) -> nn.Module | None:
        return self._original()

    def asks_for_gradients(self) -> bool:
        """Whether every parameter requires a gradient, and there is one."""
        return bool(self._parameters) and all(parameter.requires_grad for parameter in self._parameters)


def mapping_is(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two mappings hold the same objects."""
    return all(value is other.get(key) for key, value in one.items())


def replace_tensors(clone: nn.Module, new: Mapping[int, Tensor]) -> list[tuple[Any, Any, Any]]:
    """Give a tied clone other tensors, by the ``id`` of the old, wherever it holds these; the original is not touched.

    Returns:
        what was replaced, for :func:`put_back`.
    """
    replaced: list[tuple[Any, Any, Any]] = []

    def put(holder: Any, key: Any, value: Any) -> None:
        replaced.append((holder, key, holder[key]))
        holder[key] = value

    copies: dict[int, TensorDictParams] = {}
    for module in modules(clone):
        if isinstance(module, TensorDictParams):
            continue  # the original holds the same object: its holders are given a copy
        # Attributes and lists of tensors as well: recurrent layers compute with `_flat_weights`.
        lists = [value for value in vars(module).values() if isinstance(value, list)]
        holders: list[Any] = [module._parameters, module._buffers, vars(module), *lists]
        for holder in holders:
            for key, value in enumerate(holder) if isinstance(holder, list) else list(holder.items()):
                if isinstance(value, Tensor) and id(value) in new:
                    put(holder, key, new[id(value)])
        for name, child in list(module._modules.items()):
            if isinstance(child, TensorDictParams) and any(
                id(tensor) in new for tensor in (*child.parameters(), *child.buffers())
            ):
                put(module._modules, name, copies.setdefault(id(child), params_with(child, new)))
    return replaced


def put_back(replaced: list[tuple[Any, Any, Any]]) -> None:
    """Undo :func:`replace_tensors`."""
    for holder, key, value in reversed(replaced):
        holder[key] = value


def _refuse_uncopyable(module: nn.Module) -> None:
    for path, child in named_modules(module):
        where = f"submodule {path!r} of the policy" if path else "the policy"
        if is_compiled(child):
            raise PreparationError(
                f"{where} was compiled before it was prepared, so hooks would never fire: prepare the plain module "
                "(`compiled._orig_mod`) and compile the hooked one, or pass `compile_policy` to the collector"
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise PreparationError(f"{where} is a ScriptModule, which cannot be hooked: prepare the plain nn.Module")
        lazy = [
            name
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]
            if torch.nn.parameter.is_lazy(tensor)
        ]
        if lazy:
            raise PreparationError(
                f"{where} ({type(child).__name__}) is lazy and {lazy[0]!r} has no shape yet: "
                "call the policy once on a batch, then prepare it"
            )


def named_tensors(module: nn.Module, path: str = "") -> dict[str, Tensor]:
    """The parameters and buffers of a module under every name that they have.

    Not by ``named_parameters``, which some modules override with fewer arguments or for a part of their parameters.
    """
    dot = f"{path}." if path else ""
    found = {
        f"{dot}{name}": tensor
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    }
    for name, child in module._modules.items():
        if child is not None:
            found |= named_tensors(child, f"{dot}{name}")
    return found


def whole_copy(module: M, what: str) -> M:
    """A copy of a network with weights of its own.

    Args:
        module: the network.
        what: what is done with it, for the message.

    Raises:
        PreparationError: if it cannot be copied.
    """
    memo: dict[int, Any] = {}
    detach_graphs(module, memo)  # of its last forward, as those of pruning and of norms of weights leave one
    seeds = dict(memo)
    try:
        return deep_copy(module, memo)
    except PreparationError:
        raise
    except Exception as error:
        path = _uncopyable(module, seeds)
        where = f" at {path!r}" if path else ""
        raise PreparationError(
            f"{what} a copy of {type(module).__name__}, which cannot be copied{where} ({type(error).__name__}: "
            f"{error!s:.300}): remove what does not deep-copy (locks, open files, tensors of a class without it)"
        ) from error


def _uncopyable(module: nn.Module, seeds: Mapping[int, Any]) -> str | None:
    """The attribute of a module, or of what it holds, that does not deep-copy."""
    for path, child in named_modules(module):
        for name, value in vars(child).items():
            if name not in INTERNAL and not isinstance(value, nn.Module):
                found = _uncopyable_in(value, f"{path}.{name}" if path else name, seeds, 0)
                if found is not None:
                    return found
    return None


def _uncopyable_in(value: Any, path: str, seeds: Mapping[int, Any], depth: int) -> str | None:
    try:
        copy.deepcopy(value, dict(seeds))
        return None
    except Exception:
        if depth > DEEP:
            return path
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, set, collections.deque)):
        parts = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        parts = [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]
    return next((found for where, item in parts if (found := _uncopyable_in(item, where, seeds, depth + 1))), path)
