"""Passes of ours on scratch state, so that what the user's forward writes is written as often as the user runs it.

Some policies write in their forward: running statistics, power iteration, counters, hidden states, caches. A replay
must compute on what was there before the forward that it explains, and leave what is there now. For its duration the
clone holds copies; tensors, which the clone shares with the user's policy and with other processes, are never written
to. Which policies write is declared nowhere: it is found by looking, at forwards that a replay follows and at replays,
at all that :mod:`tdhook_rl.policies.mutable_state` finds. Policies made of known layers are not looked at.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.internals.torch_names import copy_all_
from tdhook_rl.policies.memory import is_dense, memory_of, same_values
from tdhook_rl.policies.mutable_state import INTERNAL, MutableState, find_state, with_tensors
from tdhook_rl.policies.outside import find_state_inside_and_outside
from tdhook_rl.sites.known import all_modules, unknown_modules, writes_input
from tdhook_rl.sites.runtime import vmap_level

#: In how many forwards and passes, in one training mode, contents of tensors are compared before only versions are.
LOOKS = 3
#: Elements up to which a tensor is copied before every forward; a larger one where its version has changed.
SMALL = 65_536

#: Contents in which tensors may be.
_CONTAINERS = (dict, list, collections.deque)


class Snapshot:
    """What a policy held at one time.

    Attributes:
        held: the mutable things and the tensors.
        contents: of each thing.
        copies: of the tensors that a forward may write in place, by the ``id`` of the tensor.
        in_graph: a pass has run on the copies themselves while gradients were on, and its graph may hold them.
    """

    in_graph = False

    def __init__(self, held: MutableState, copies: dict[int, Tensor], versions: dict[int, int]) -> None:
        self.held = held
        self.contents = [one.kind.read(one.thing) for one in held.things]
        self.copies = copies
        self.versions = versions

    def unchanged(self) -> bool:
        """Whether every thing holds what it held then; tensors are taken by their identity."""
        for one, then in zip(self.held.things, self.contents, strict=True):
            if not one.kind.same(one.thing, then):
                return False
        return True

    def put(self, new: Mapping[int, Tensor] | None = None) -> None:
        """Put all contents back, with other tensors in the place of some."""
        for one, content in zip(self.held.things, self.contents, strict=True):
            if isinstance(content, _CONTAINERS):
                one.kind.write(one.thing, _swapped(content, new) if new else content)
            elif not one.kind.same(one.thing, content):
                one.kind.write(one.thing, content)


class WriteWatch:
    """Looks at one policy while it runs, and with ``outside`` at what its forwards may write beside what it holds.

    Attributes:
        modules: those that are looked at, with their paths.
        idle: the policy is made of modules that are known to write nothing.
        writes: where the forward was seen to write, with the class of the module; empty for most policies.
        may_write_input: the forward may change what it is given.
    """

    def __init__(self, policy: nn.Module, outside: bool = False) -> None:
        self.modules = unknown_modules(policy)
        self._find = find_state_inside_and_outside if outside else find_state
        self.idle = not self.modules
        self.may_write_input = not self.idle or any(writes_input(child) for _, child in all_modules(policy))
        self.writes: dict[str, str] = {}
        self._last: Snapshot | None = None
        self._looks = 0
        self._mode: list[bool] = []

    def writes_nothing(self) -> bool:
        """Whether forwards and passes in this training mode were looked at often enough, and nothing was written."""
        if self.idle:
            return True
        mode = [module.training for _, module in self.modules]
        return self._looks >= LOOKS and not self.writes and mode == self._mode

    # ------------------------------------------------------------------ the forward that is explained

    def begin(self) -> Snapshot:
        """What the policy holds before a forward or a pass."""
        mode = [module.training for _, module in self.modules]
        if mode != self._mode:
            self._mode, self._looks = mode, 0
        last = self._last
        if last is not None and last.unchanged():
            _refresh(last)
            return last
        held = self._find(self.modules)
        self._last = Snapshot(held, *_copies(held.tensors, last))
        return self._last

    def end(self, start: Snapshot) -> None:
        """After a forward: note what it has written since ``start``."""
        look = self._look()
        for tensor, path, owner in start.held.tensors:
            then = start.copies.get(id(tensor))
            if then is None or path in self.writes:
                continue
            if _version(tensor) != start.versions[id(tensor)] or (look and not same_values(tensor, then)):
                self.writes[path] = owner
        self._note_things(start, {})

    def _look(self) -> bool:
        look = self._looks < LOOKS and vmap_level() < 0
        self._looks += look
        return look

    def _note_things(self, start: Snapshot, new: Mapping[int, Tensor]) -> None:
        for one, content in zip(start.held.things, start.contents, strict=True):
            content = _swapped(content, new) if new and isinstance(content, _CONTAINERS) else content
            if one.kind.same(one.thing, content):
                continue
            now = one.kind.read(one.thing)
            if not isinstance(content, dict):
                self.writes.setdefault(one.path, one.owner)
                continue
            dot = f"{one.path}." if one.path else ""
            for key in {**content, **now}:
                if key not in INTERNAL and content.get(key, one) is not now.get(key, one):
                    self.writes.setdefault(f"{dot}{key}", one.owner)

    # ------------------------------------------------------------------ a pass of ours

    @contextmanager
    def scratch(self, start: Snapshot | None = None) -> Iterator[None]:
        """A pass on copies of what was held at ``start`` (now, if not given), after which all is as it is now."""
        if self.idle:
            yield
            return
        if start is None:
            now = start = self.begin()
        elif start.unchanged():
            now = start
        else:
            now = Snapshot(self._find(self.modules), {}, {})
        own = self._own(start)
        start.put(own)
        try:
            yield
        finally:
            if self._look():
                for tensor, path, owner in start.held.tensors:
                    used = own.get(id(tensor))
                    if used is not None and path not in self.writes and not same_values(used, start.copies[id(tensor)]):
                        self.writes[path] = owner
                self._note_things(start, own)
            now.put()

    def _own(self, start: Snapshot) -> dict[int, Tensor]:
        """The tensors of one pass. One that is never written needs no copy of its own."""
        start.in_graph |= torch.is_grad_enabled()
        if self._looks >= LOOKS and not self.writes:
            return start.copies
        kept = {
            id(tensor): start.copies[id(tensor)]
            for tensor, path, _ in start.held.tensors
            if tensor.numel() > SMALL and id(tensor) in start.copies and path not in self.writes
        }
        with torch.inference_mode(False), torch.no_grad():
            return kept | _cloned({key: tensor for key, tensor in start.copies.items() if key not in kept})


def _swapped(content: Any, new: Mapping[int, Tensor]) -> Any:
    """A content with other tensors in the place of some."""
    if isinstance(content, dict):
        return {key: with_tensors(value, new) for key, value in content.items()}
    items = [with_tensors(value, new) for value in content]
    return items if isinstance(content, list) else collections.deque(items, content.maxlen)


def _copies(
    tensors: Sequence[tuple[Tensor, str, str]], last: Snapshot | None
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Copies of the tensors that a forward may write in place, and their versions.

    What has a graph is left out: it cannot be written to without one, and a copy would have none.
    """
    able = {id(tensor): tensor for tensor, _, _ in tensors if not tensor.requires_grad}
    versions = {key: _version(tensor) for key, tensor in able.items()}
    kept: dict[int, Tensor] = {}
    if last is not None:
        for key, tensor in able.items():
            if tensor.numel() > SMALL and key in last.copies and versions[key] == last.versions.get(key, -1) != -1:
                kept[key] = last.copies[key]
    with torch.inference_mode(False), torch.no_grad():
        return kept | _cloned({key: tensor for key, tensor in able.items() if key not in kept}), versions


def _cloned(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """A copy of each tensor; those that are views of one memory stay so."""
    places = {key: memory_of(tensor) for key, tensor in tensors.items()}
    counts = collections.Counter(place for place in places.values() if place)
    memo: dict[int, Any] = {}
    return {
        key: copy.deepcopy(tensor.detach(), memo) if counts[places[key]] > 1 else tensor.detach().clone()
        for key, tensor in tensors.items()
    }


def _refresh(last: Snapshot) -> None:
    """Bring the copies up to date: another process, or a write past autograd, leaves the version as it was."""
    old: dict[int, Tensor] = {}
    for tensor, _, _ in last.held.tensors:
        key = id(tensor)
        if key in last.copies:
            version = _version(tensor)
            if tensor.numel() <= SMALL or version != last.versions[key] or version < 0:
                old[key] = tensor
                last.versions[key] = version
    with torch.inference_mode(False), torch.no_grad():
        if last.in_graph:  # a backward pass may be to come, which refuses tensors that were written meanwhile
            last.copies |= _cloned(old)
            last.in_graph = False
        elif old:
            other = {key: tensor for key, tensor in old.items() if not is_dense(tensor)}  # is copied as a whole
            last.copies |= _cloned(other)
            dense = [key for key in old if key not in other]
            if dense:
                copy_all_([last.copies[key] for key in dense], [old[key] for key in dense])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
