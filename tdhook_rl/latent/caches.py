"""The user's ``cache=``: a TensorDict that holds what was captured last, and what waits to be put there."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.sites.repeats import Several

Key = tuple[str, ...]


def holds_still(cache: TensorDictBase) -> bool:
    """Whether a cache is written in place: its entries keep their shape, dtype and memory."""
    return cache.is_locked or cache.is_memmap()


class CacheStore:
    """Writes into a caller's cache; copies of a policy in one process share it.

    In another process (an unpickled or forked copy) the caller's object is out of reach, and its memory must not
    be written from there: the copy fills an empty TensorDict of its own.
    """

    def __init__(self, data: TensorDictBase | None = None) -> None:
        self._data = TensorDict() if data is None else data
        self._process = os.getpid()
        self._lock = threading.Lock()

    @property
    def data(self) -> TensorDictBase:
        if self._process != os.getpid():
            self._data, self._process = TensorDict(), os.getpid()
        return self._data

    def fill(self, keys: Collection[Key], values: Mapping[Key, Tensor], batch: torch.Size) -> None:
        """Replace what is held under ``keys`` by the captures of one call of the given batch size."""
        with self._lock:
            data = self.data
            if holds_still(data):
                self._write_in_place(values)
                return
            for key in keys:
                data.pop(key, None)
            _fit(data, batch, values)
            for key, value in values.items():
                data.set(key, value)

    def put(self, key: Key, value: Tensor) -> None:
        """Replace one entry; the batch size becomes what this entry and the others have in common."""
        with self._lock:
            data = self.data
            if holds_still(data):
                self._write_in_place({key: value})
                return
            data.pop(key, None)
            _fit(data, _common(data.batch_size, value.shape), [key])
            data.set(key, value)

    def require(self, keys: Collection[Key]) -> None:
        """Check that a cache that is written in place has entries for these keys."""
        if not holds_still(self.data):
            return
        for key in keys:
            if not isinstance(self.data.get(key, None), Tensor):
                raise MissingKeyError(
                    f"the cache is locked or memory-mapped and has no entry {_plain(key)!r}; "
                    f"{nearest(_plain(key), self.data.keys(True, True))}. Put a tensor of the batch and "
                    "feature shape there before it is locked"
                )

    def _write_in_place(self, values: Mapping[Key, Tensor]) -> None:
        # All are checked before the first is written.
        self.require(values)
        for key, value in values.items():
            held = self.data.get(key)
            if held.shape != value.shape:
                raise InputError(
                    f"the cache is locked or memory-mapped with shape {tuple(held.shape)} for {_plain(key)!r}, but the "
                    f"capture has shape {tuple(value.shape)}: call with batches of one size, or use cache=TensorDict()"
                )
        for key, value in values.items():
            self.data.set_(key, value)

    def __deepcopy__(self, memo: dict) -> CacheStore:
        return self

    def __reduce__(self) -> tuple:
        return CacheStore, ()


class LastCall:
    """What a method without a cache captured in the last call, for ``hooked.hooking_context.cache``.

    Only references are kept until somebody looks; from then on a TensorDict is filled at each call.
    """

    def __init__(self, keys: Collection[Key]) -> None:
        self._seen: dict[str, Any] = {"store": None, "last": None}  # shared by deep copies of the policy
        self._keys = keys
        self._staged: tuple[Mapping[Key, Tensor], torch.Size] | None = None

    def stage(self, values: Mapping[Key, Tensor], batch: torch.Size) -> None:
        self._staged = values, batch

    def close(self, complete: bool) -> None:
        staged, self._staged = self._staged, None
        if not complete or staged is None:
            return
        if self._seen["store"] is None:
            self._seen["last"] = staged
        else:
            values, batch = staged
            self._seen["store"].fill(self._keys, {key[1:]: value for key, value in values.items()}, batch)

    def store(self) -> CacheStore:
        """The cache, with the captures of the last call; filled from now on."""
        store = self._seen["store"]
        if store is None:
            store = self._seen["store"] = CacheStore()
            if self._seen["last"] is not None:
                values, batch = self._seen["last"]
                store.fill(self._keys, {key[1:]: value for key, value in values.items()}, batch)
                self._seen["last"] = None
        return store

    def __deepcopy__(self, memo: dict) -> LastCall:
        copy = LastCall(self._keys)
        copy._seen = self._seen
        return copy

    def __reduce__(self) -> tuple:
        return LastCall, (tuple(self._keys),)


class CallRecord:
    """What gradient hooks know of the call they were set in: nothing with a graph, so that none is kept."""

    def __init__(self) -> None:
        self.batch: torch.Size | None = None
        self.under_way = False  # from the first watched tensor of a call of `forward` to the end of the call
        self.ran: set[Key] = set()
        self.times: dict[Key, int] = {}  # for each site, how often it ran outside replays
        self.arrived: dict[Key, dict[int, Tensor]] = {}  # gradients of single runs that wait for those of the others


class Staging:
    """The captures of a call under way; at its end they go to the cache, unless it failed.

    One for each copy of a hooked policy, among its routes: calls of ``forward`` close it as complete, those of
    ``annotate`` and ``get_dist`` do not.
    """

    def __init__(self, store: CacheStore, keys: Collection[Key]) -> None:
        self.store = store
        self.keys = keys
        self.record = CallRecord()
        self.loose: dict[Key, Tensor] = {}  # of a call with tensors, which has no batch size
        self.several: dict[Key, Several] = {}  # the same, of sites of which all runs are kept
        self.values: dict[Key, Tensor] | None = None

    def stage(self, values: dict[Key, Tensor], batch: torch.Size) -> None:
        self.values = values
        self.record.batch = batch

    def close(self, complete: bool) -> None:
        values, loose, record = self.values, self.loose, self.record
        self.values, self.loose, self.several, self.record = None, {}, {}, CallRecord()
        record.under_way = False
        if not complete:
            return
        if values is not None:
            self.store.fill(self.keys, values, record.batch or torch.Size())
        elif loose or record.times:
            self.store.fill(self.keys, loose, torch.Size())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"record": CallRecord(), "loose": {}, "several": {}, "values": None}


def _fit(data: TensorDictBase, batch: torch.Size, keys: Iterable[Key]) -> None:
    """Give the cache, and the nodes above the keys, the batch size of a call, as far as what they hold allows."""
    nodes = dict.fromkeys(key[:length] for key in keys for length in range(1, len(key)))
    for node in (data, *(data.get(key, None) for key in nodes)):
        if not isinstance(node, TensorDictBase):
            continue  # not there yet
        size = batch
        for value in node.values(True, True):
            size = _common(size, value.shape)
        if node.batch_size != size:
            node.batch_size = size


def _common(first: torch.Size, second: torch.Size) -> torch.Size:
    """The sizes that two shapes begin with."""
    pairs = zip(first, second, strict=False)
    return torch.Size(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _plain(key: Key) -> str | Key:
    return key[0] if len(key) == 1 else key
