"""Whose results these are: beside each mask a stamp, one number for each row, of the policy that computed it.

A key does not say who wrote what is under it, and a row of a buffer may be written over around the results that it
held. A stamp is a projection of what a row's results depend on (what the policy saw; the action, where that is
explained), by numbers that follow from a number drawn when the policy was prepared, which copies and pickles of it
share, and from its weights and attributes. Whoever reads the row projects it again: the stamp differs where another
policy, method or option wrote the results, and where the weights, attributes that the user sets (a temperature), or the
row itself have changed since. 0 is nobody's stamp.
"""

from __future__ import annotations

import operator
import secrets
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.real_rows import FEW, defined_values, reached_values, row_mask, surely_finite
from tdhook_rl.calls.writing import set_entries
from tdhook_rl.internals.torch_names import is_any_autocast_enabled
from tdhook_rl.policies.contents import HeldTensors, versions
from tdhook_rl.policies.draws import action_keys, draws, sample_keys
from tdhook_rl.sites.listed import modules

Key = tuple[str, ...]

#: What a root's stamp is called beside its mask: ``("computed", "attr.stamp")``.
STAMP = ".stamp"
#: Of a stamp: in float32 a row far from zero, or beside one large entry, would have the stamp of its neighbours.
PRECISION = torch.float64
#: By type of device the precision there, where it has none so high.
LOWER = {"mps": torch.float32}
#: How far the stamp of one row may differ between batches, relative to the terms that it adds up.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A longer row is projected by numbers that repeat: after a prime, so that no two frames of it have the same.
LONGEST = 65_521
#: What Python's numbers hold as they are.
_EXACT = frozenset((torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool))
#: Calls in a row in which buffers move and weights do not, after which they are taken for a state.
MOVES = 3


def stamp_key(root: str) -> Key:
    return "computed", f"{root}{STAMP}"


def precision_on(device: torch.device) -> torch.dtype:
    """The precision of stamps on a device."""
    return LOWER.get(device.type, PRECISION)


def is_stamp(key: NestedKey) -> bool:
    """Whether a key is that of a stamp."""
    return isinstance(key, tuple) and key[0] == "computed" and key[-1].endswith(STAMP)


def is_stamped(one: BoundMethod) -> bool:
    """Whether what a method wrote for a row depends on that row alone, and can be computed again."""
    apart = one.whole_batch and one.when != "step"
    return not apart and one.horizon == "step" and not one.only_in_forward


class Provenance:
    """The stamps of one prepared policy, by what it and its interventions read and by its methods."""

    def __init__(self, policy: TensorDictModuleBase, inputs: list[NestedKey], bound: Sequence[BoundMethod]) -> None:
        self._token = secrets.randbits(62)  # torch's generators stay as they are
        self._edits = 0  # how often the user had set attributes of the policy
        self._inputs = inputs
        drawn = [key for child in modules(policy) if draws(child) for key in sample_keys(child)]
        actions = [*drawn, *action_keys(policy.out_keys)]
        # Of each root what its methods read beside the policy's inputs; captured activations follow from these.
        self._more: dict[str, list[NestedKey]] = {}
        # Whether inputs or activations are explained there, and by what; and the keys of its mask and its stamp.
        self._judged: dict[str, tuple[bool, list[Any]]] = {}
        for one in bound:
            for root in dict.fromkeys(key[0] for key in one.result_keys):
                known = self._judged.get(root, (False, []))
                inner = one.bound or one
                self._judged[root] = (known[0] or inner.declared is not None, [*known[1], inner])
                if not is_stamped(one):
                    continue
                more = [*one.reads, *(actions if one.replays else ())]
                read = self._more.setdefault(root, [])
                read += [key for key in dict.fromkeys(more) if key not in self._inputs and key not in read]
        self.marks = {
            root: (("computed", root), stamp_key(root) if root in self._more else None) for root in self._judged
        }
        self._forget_all()

    def _forget_all(self) -> None:
        self._held: HeldTensors | None = None  # the weights, and the buffers, which are weights unless they drift
        self._doubted = False
        self._written = 0  # how much of what the policy holds its forward was seen to write
        self._seen: tuple[int, ...] | None = None  # the versions that the fingerprint is of
        # Of buffers and of tensors in attributes: in how many calls in a row they have moved, and whether they drift.
        self._moves, self._drifts = [0, 0], [False, False]
        self._weights = 0
        self._full: Tensor | None = None  # the mask of a batch of which every row is real
        self._vectors: dict[tuple[NestedKey, int, torch.device], tuple[Tensor, list[float]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_token", "_edits", "_inputs", "_more", "_judged", "marks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_all()

    def mark_keys(self, keys: Sequence[NestedKey]) -> list[NestedKey]:
        """The masks and then the stamps that stand beside results."""
        marks = [self.marks[root] for root in dict.fromkeys(key[0] for key in keys)]
        return [*(mask for mask, _ in marks), *(stamp for _, stamp in marks if stamp is not None)]

    @property
    def stamped(self) -> Mapping[str, Sequence[NestedKey]]:
        """The roots that have stamps, and what is read for each beside the policy's inputs."""
        return self._more

    def publish(
        self, policy: Any, source: TensorDictBase, output: TensorDictBase, results: Mapping[Key, Tensor]
    ) -> None:
        """Write the results of one call (masks of schedules among them), which rows are real, and whose they are."""
        if not results:
            return
        by_root: dict[str, list[Tensor]] = {}
        stamps = False
        for (root, *_), value in results.items():
            if root != "computed":
                by_root.setdefault(root, []).append(value)
                stamps = stamps or root in self._more
        # In a compiled graph, and inside vmap, rows are nobody's: what is read of them later is computed again.
        traced = torch.compiler.is_compiling() or policy._hooked.runtime.level >= 0
        trace = None
        if stamps and not traced and self.note_weights(policy):
            trace = self.trace(source)
        written = dict(results)
        for root, values in by_root.items():
            mask_key, stamped = self.marks[root]
            stamp = None if trace is None or stamped is None else self.stamp(root, trace, output)
            written[mask_key] = mask = self.mask(root, values, source, results.get(mask_key), traced, stamp)
            if stamped is not None:
                written[stamped] = mask.to(precision_on(mask.device)) * 0 if stamp is None else stamp
        set_entries(output, written)

    # ------------------------------------------------------------------ weights

    def forget(self) -> None:
        """Look at the weights again before the next call: another process may have changed them in place."""
        self._doubted = True

    def note_weights(self, policy: Any) -> bool:
        """Follow the weights, where their versions say that they have changed, and attributes that the user has set.

        Returns:
            whether the policy runs with weights of its own, not with others that are lent to it for a functional call.
        """
        tie, effects = policy._hooked.tie, policy._hooked.runtime.effects
        written = () if effects is None else effects.watch.writes
        if tie is not None and tie.edits != self._edits:
            self._edits, self._held = tie.edits, None
            self._vectors.clear()
        if self._doubted:
            self._doubted, self._seen = False, None
            known = self._held
            if known is not None and not known.are_in_place():
                self._held = None
            elif known is not None and len(written) == self._written and not known.buffers and not known.attributes:
                if known.are_kept(known.parameters):  # as they mostly are; how often they were written to says no more
                    return True
        if self._held is None or len(written) != self._written:
            self._held, self._seen, self._written = HeldTensors(policy, written), None, len(written)
        held = self._held
        groups = zip((held.buffers, held.attributes), self._drifts, strict=True)
        states = [[] if drifts else one for one, drifts in groups]
        seen: list[int] = []
        for one in (held.parameters, *states):
            version = versions(one) if one else 0
            if version is None:
                return False
            seen.append(version)
        if tuple(seen) == self._seen and seen[0] >= 0:
            self._moves = [0, 0]
            return True
        # What moves from call to call without the weights is the policy's state, and none of its weights.
        before = self._seen if self._seen is not None and seen[0] == self._seen[0] >= 0 else tuple(seen)
        for place in (0, 1):
            self._moves[place] = self._moves[place] + 1 if seen[place + 1] != before[place + 1] else 0
            if self._moves[place] == MOVES and held.parameters:
                self._drifts[place], states[place], seen[place + 1] = True, [], 0
        found = held.number([*held.parameters, *states[0], *states[1]])
        if found != self._weights:
            self._weights = found
            self._vectors.clear()
        self._seen = tuple(seen)
        return True

    # ------------------------------------------------------------------ stamps

    def trace(self, source: TensorDictBase) -> Tensor:
        """What the stamps of all roots share: of what the policy saw, a number for each row, or one for all."""
        return self._add(None, self._inputs, source)

    def stamp(self, root: str, trace: Tensor | None, data: TensorDictBase) -> Tensor:
        """The stamps of one root, the batch shape; without a trace, of what the policy saw in the data too."""
        if trace is None:
            found = self._add(None, [*self._inputs, *self._more[root]], data)
        else:
            found = self._add(trace, self._more[root], data) if self._more[root] else trace
        return found if found.shape == data.batch_size else _as_batch(found, data.batch_size)

    def own_rows(self, root: str, data: TensorDictBase) -> Tensor | None:
        """The rows of a batch that hold results of this policy, as it is now, under a root; ``None`` if none can.

        A row that holds NaN or infinite values has such a stamp, which is anybody's; where it is masked as not
        computed, it says of any policy what is so.
        """
        stored = data.get(stamp_key(root), None)
        mask = row_mask(data, ("computed", root))
        batch = data.batch_size
        if root not in self._more or mask is None or not isinstance(stored, Tensor) or stored.shape != batch:
            return None
        expected = self.stamp(root, self.trace(data), data)
        keys = [*self._inputs, *self._more[root]]
        terms = _as_batch(self._add(None, keys, data, size=True), batch)
        stored, mask = stored.to(expected), mask.to(expected.device)
        near = (stored - expected).abs() <= RELATIVE[expected.dtype] * terms
        undefined = ~(torch.isfinite(stored) | torch.isfinite(expected) | mask)
        return (near & (stored != 0) & torch.isfinite(terms)) | undefined

    def _add(self, total: Tensor | None, keys: Sequence[NestedKey], data: TensorDictBase, size: bool = False) -> Tensor:
        """Add the projections of entries; with ``size`` the sizes of the terms."""
        batch = data.batch_size
        few: float | None = None  # of one row of few entries, which Python adds up faster
        for key in keys:
            value = get_entry(data, key)
            if not isinstance(value, Tensor):
                continue
            rows = _flat(value, batch)
            vector, factors = self._vector(key, rows.shape[1], rows.device)
            if total is None:
                total = self._vector("", 1, rows.device)[0]
                total = total.abs() if size else total
            elif total.device != rows.device:
                total = total.to(rows.device)
            if factors and len(rows) == 1 and not size and rows.dtype in _EXACT:
                few = sum(map(operator.mul, rows.tolist()[0], factors), few or 0.0)
                continue
            if rows.dtype is not (precision := vector.dtype):
                rows = rows.double() if precision is torch.float64 else rows.to(precision)  # `to` takes twice as long
            if size:
                rows, vector = rows.abs(), vector.abs()
            if is_any_autocast_enabled():  # which would run the product in half precision
                total = total + (rows * vector).sum(-1)
            else:
                total = torch.addmv(total.reshape(-1) if total.ndim != 1 else total, rows, vector)
        if total is None:
            total = self._vector("", 1, data.device or torch.device("cpu"))[0]
        return total if few is None else total + few

    def _vector(self, key: NestedKey, length: int, device: torch.device) -> tuple[Tensor, list[float]]:
        """What an entry of so many features is projected by; of few on the CPU as a list too."""
        known = self._vectors.get((key, length, device))
        if known is None:
            seed = [self._token, self._edits, self._weights, zlib.crc32(repr(key).encode())]
            drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(min(length, LONGEST), np.float32)
            with torch.inference_mode(False):
                vector = torch.from_numpy(np.resize(drawn, length)).to(device, precision_on(device))
            few = length <= FEW and device.type == "cpu" and vector.dtype is torch.float64
            known = vector, vector.tolist() if few else []
            self._vectors[key, length, device] = known
        return known

    # ------------------------------------------------------------------ masks

    def mask(
        self,
        root: str,
        values: Sequence[Tensor],
        source: TensorDictBase,
        given: Tensor | None = None,
        traced: bool = False,
        stamp: Tensor | None = None,
    ) -> Tensor:
        """Which rows of a root's values are real, of those that a schedule has chosen (``given``).

        An attribution is where it and what it explains are finite; an activation may be infinite. Where a schedule has
        left rows out, they are none. Where ``traced``, numbers cannot be looked at. Where a ``stamp`` is finite, so is
        all that it adds up.
        """
        explains, methods = self._judged[root]
        if given is not None and not bool(given.any()):
            return given
        inputs: Sequence[Tensor] = ()
        if explains and not (stamp is not None and self._adds_up(root) and surely_finite(stamp)):
            found = [get_entry(source, key) for one in methods for key in one.declared or ()]
            inputs = [value for value in found if isinstance(value, Tensor)]
        rows = None
        if traced or not (all(map(surely_finite, values)) and all(map(surely_finite, inputs))):
            values = reached_values(values, traced) if explains else values
            rows = defined_values([*values, *inputs], source.batch_size, infinite=not explains)
        if rows is None:
            return self._all_rows(source.batch_size, values[0].device) if given is None else given
        return rows if given is None else rows & given

    def _adds_up(self, root: str) -> bool:
        """Whether a stamp adds up all that the methods of a root explain: not a state that the policy writes over."""
        for one in self._judged[root][1]:
            for key in one.declared or ():
                if key not in self._inputs:
                    return False
        return True

    def _all_rows(self, batch: torch.Size, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ones(batch, dtype=torch.bool, device=device)
        if self._full is None or self._full.shape != batch or self._full.device != device:
            with torch.inference_mode(False):
                self._full = torch.ones(batch, dtype=torch.bool, device=device)
        return self._full.clone()  # a third of the time that making one takes


def _flat(value: Tensor, batch: torch.Size) -> Tensor:
    """An entry as ``(rows, features)``."""
    if type(value) is not Tensor:
        value = value.as_subclass(Tensor)
    if value.requires_grad:
        value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.ndim == 2 and len(batch) == 1:
        return value
    return value.reshape(batch.numel(), value.shape[len(batch) :].numel())


def _as_batch(value: Tensor, batch: torch.Size) -> Tensor:
    return (value.expand(batch.numel()) if len(value) == 1 else value).reshape(batch)
