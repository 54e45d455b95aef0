"""The results that a batch holds already and those that are computed now, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry, surely_lacks
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.provenance import is_stamped, precision_on, stamp_key
from tdhook_rl.calls.real_rows import real_rows, row_mask, without_other_rows
from tdhook_rl.calls.writing import require_room, set_entries, set_tensor
from tdhook_rl.internals.tensordict_names import has_names, new_unsafe, set_str
from tdhook_rl.replaying.batching import shallow_copy

Key = tuple[str, ...]


class Found:
    """The results of a batch: those that are the policy's own already, and those that are computed.

    A result that the batch brings is kept in the rows whose stamp says that this policy wrote it, with the weights that
    it has now and for what the row holds now (see :mod:`tdhook_rl.calls.provenance`).

    Attributes:
        missing: the methods that are to be computed, because some row lacks their results.
    """

    def __init__(self, policy: HookedPolicy, data: TensorDictBase, wanted: Sequence[BoundMethod]) -> None:
        self._policy = policy
        self._data = data
        self._wanted = wanted
        self._real = real_rows(data)
        self._computed: dict[Key, Tensor] = {}
        self._own: dict[int, Tensor] = {}  # by method: the rows whose results are its own
        self._trace: Tensor | None = None  # what the stamps of all roots share
        self.missing: list[BoundMethod] = []
        self._by_root: dict[str, list[BoundMethod]] = {}
        for one in wanted:
            for key in one.result_keys:
                of_root = self._by_root.setdefault(key[0], [])
                if one not in of_root:
                    of_root.append(one)
        roots = (*self._by_root, "computed")
        #: Whether the batch has nothing where results go.
        self._is_new = surely_lacks(data, frozenset(roots))
        self._held = {} if self._is_new else {root: get_entry(data, root) for root in roots}
        for root, node in self._held.items():
            if node is None:
                continue
            # A result without a node of its own, such as the convergence delta, is told from the user's by its stamp.
            leaf = any(key == (root,) for one in wanted for key in one.result_keys)
            if not leaf or get_entry(data, stamp_key(root)) is None:
                require_room(node, root)
        own = policy._hooked.provenance
        with policy._hooked.runtime.lock:
            own.forget()
            own.note_weights(policy)
            if self._held.get("computed") is None:  # nobody says that it has computed anything
                self.missing = list(wanted)
                return
            by_root = {root: own.own_rows(root, data) for root in self._by_root}
        # Beside methods that write per step, the stamp of a root is theirs.
        stepping = {key[0] for one in wanted if one.when == "step" for key in one.result_keys}
        for one in wanted:
            rows = self._rows(one, by_root, stepping)
            if rows is not None and bool(rows.any()):
                self._own[id(one)] = rows
            if rows is None or not bool((rows if self._real is None else rows | ~self._real).all()):
                self.missing.append(one)

    def _rows(self, one: BoundMethod, by_root: dict[str, Tensor | None], stepping: set[str]) -> Tensor | None:
        batch = self._data.batch_size
        rows: Tensor | None = None
        for key in one.result_keys:
            stored, own = self._data.get(key, None), by_root[key[0]]
            mask = self._data.get(("computed", key[0]), None)
            if own is None or not isinstance(stored, Tensor) or not isinstance(mask, Tensor):
                return None
            if (
                not is_stamped(one)
                or (one.when != "step" and key[0] in stepping)
                or stored.shape[: len(batch)] != batch
            ):
                return None
            rows = own if rows is None else rows & own
        return rows

    def add(self, results: Mapping[Key, Tensor]) -> None:
        """Take what was computed, of the batch shape."""
        self._computed.update(results)

    def together(self, result: TensorDict) -> TensorDict:
        """The batch with its results."""
        by_root: dict[str, dict[Key, Tensor]] = {root: {} for root in self._by_root}
        for one in self._wanted:
            for key in one.result_keys:
                value = self._value(one, key)
                if value is not None:  # boolean inputs drop out
                    by_root[key[0]][key] = value
        values: dict[Key, Tensor] = {}
        marks: dict[Key, Tensor] = {}
        for root, of_root in by_root.items():
            if not of_root:
                continue
            mask_key, stamped = self._policy._hooked.provenance.marks[root]
            stamp = self._stamp(root) if stamped is not None else None
            marks[mask_key] = mask = self._mask(root, list(of_root.values()), stamp)
            values |= of_root if self._real is None else without_other_rows(of_root, self._real.to(mask.device))
            if stamped is not None:
                if stamp is None:
                    stamp = torch.zeros_like(mask, dtype=precision_on(mask.device))
                marks[stamped] = stamp
        self._set(result, values | marks)
        return result

    def _value(self, one: BoundMethod, key: Key) -> Tensor | None:
        if one not in self.missing:
            return self._data.get(key)
        computed, own = self._computed.get(key), self._own.get(id(one))
        if computed is None or own is None:
            return computed
        stored = self._data.get(key)
        if stored.shape != computed.shape or stored.dtype != computed.dtype:
            return computed
        return torch.where(own.reshape((*own.shape, *(1,) * (stored.ndim - own.ndim))), stored, computed)

    def _mask(self, root: str, values: list[Tensor], stamp: Tensor | None) -> Tensor:
        provenance = self._policy._hooked.provenance
        chosen = self._computed.get(("computed", root))
        if self._is_new:
            mask = provenance.mask(root, values, self._data, chosen, stamp=stamp)
            return mask if self._real is None else mask & self._real.to(mask.device)
        methods = self._by_root[root]
        stored = get_entry(self._data, ("computed", root))
        if all(one not in self.missing for one in methods):
            mask = stored
        else:
            mask = provenance.mask(root, values, self._data, chosen)
            own = [self._own[id(one)] for one in methods if id(one) in self._own]
            if len(own) == len(methods):  # of kept rows the mask is kept
                mask = torch.where(torch.stack(own).all(0), stored, mask)
        return mask if self._real is None else mask & self._real.to(mask.device)

    def _stamp(self, root: str) -> Tensor | None:
        """Whose the results of a root are; ``None`` where they are of this batch only, in which rows meet."""
        provenance, data = self._policy._hooked.provenance, self._data
        for one in self.missing:
            if one.whole_batch and one.result_keys[0][0] == root:
                return None
        if len(self._by_root) == 1:
            return provenance.stamp(root, None, data)
        if self._trace is None:
            self._trace = provenance.trace(data)
        return provenance.stamp(root, self._trace, data)

    def _read_under(self, root: str) -> TensorDict:
        """What methods read under a root: entries of the user's, as the second inputs of patching are."""
        if self._held.get(root) is not None:
            read = {key for one in self._wanted for key in one.reads if isinstance(key, tuple) and key[0] == root}
            found = self._data.select(*read, strict=False).get(root, None)
            if found is not None:
                return found
        return new_unsafe({}, batch_size=self._data.batch_size)

    def _set(self, result: TensorDict, entries: dict[Key, Tensor]) -> None:
        """Write entries in nodes of their own; of what the batch had there, results of others do not stay."""
        plain = type(result) is TensorDict and result.device is None and not has_names(result)
        if plain and self._is_new:
            set_entries(result, entries)
            return
        nodes: dict[str, Any] = {}
        for key, value in entries.items():
            if len(key) == 1:
                result.set(key[0], value)
                continue
            node = nodes.get(key[0])
            if node is None:
                old = self._held.get(key[0])
                theirs = old is None or (
                    key[0] != "computed" and get_entry(self._data, ("computed", key[0])) is not None
                )
                node = nodes[key[0]] = self._read_under(key[0]) if theirs else shallow_copy(old)
            if len(key) == 2:
                set_tensor(node, key[1], value)
            else:
                node.set(key[1:], value)
        for root, node in nodes.items():
            if plain and type(node) is TensorDict and self._held.get(root) is None:
                set_str(result, root, node, inplace=False, validated=True)
            else:
                result.set(root, node)


def is_of_another(policy: HookedPolicy, data: TensorDictBase) -> bool | None:
    """Whether stamps say that all results in a batch were written by another policy, or method, or with other weights.

    Returns:
        ``None`` where no row says whose it is: random frames, compiled calls, roots without stamps.
    """
    own, known = policy._hooked.provenance, None
    with policy._hooked.runtime.lock:
        own.forget()
        own.note_weights(policy)
        for root in own.stamped:
            mask, stamp = row_mask(data, ("computed", root)), get_entry(data, stamp_key(root))
            if mask is None or not isinstance(stamp, Tensor) or not bool((said := mask & (stamp != 0)).any()):
                continue
            rows = own.own_rows(root, data)
            if rows is not None and not bool((rows & said.to(rows.device)).any()):
                return True
            known = False
    return known
