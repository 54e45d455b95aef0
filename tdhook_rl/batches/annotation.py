"""Results of a whole batch, computed after it was collected.

Rows are explained in chunks, each at what is stored with it: its action, and the hidden state of a recurrent
policy. Only methods with ``horizon="trajectory"`` see time: they are given whole trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.batches.found import Found
from tdhook_rl.batches.keeping import Keep, kept_keys, only_kept
from tdhook_rl.batches.mismatch import Mismatch
from tdhook_rl.batches.pieces import pieces
from tdhook_rl.calls.bound import BoundMethod, observers
from tdhook_rl.calls.heads import replay_chain
from tdhook_rl.calls.inputs import (
    keys_read,
    require_as_seen,
    require_dense_inputs,
    require_inputs,
    rows_read,
    stored_inputs,
)
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.repeatable import require_repeatable, require_rows_apart
from tdhook_rl.errors import InputError, MissingKeyError, TdhookError, nearest
from tdhook_rl.policies.draws import masks_needed
from tdhook_rl.replaying.batching import PassNoise, conv_chunk, shallow_copy
from tdhook_rl.sites.runtime import vmap_level

__all__ = ["OnMismatch", "annotate", "computed"]

OnMismatch = Literal["warn", "raise", "ignore"]
#: By key a value for each row.
Results = dict[tuple[str, ...], Tensor]


def annotate(
    policy: HookedPolicy,
    data: TensorDictBase,
    chunk_size: int | None = None,
    on_mismatch: OnMismatch = "warn",
    keep: Keep = None,
    laid_out: str = "",
) -> TensorDict:
    """What :meth:`tdhook_rl.hooking.hooked.HookedMixin.annotate` does.

    Args:
        laid_out: where the batch is some of the rows of a whole, how these come, as of :func:`require_rows_apart`.
    """
    if on_mismatch not in ("warn", "raise", "ignore"):
        raise InputError(
            f"on_mismatch is 'warn', 'raise' or 'ignore', got {on_mismatch!r}; "
            f"{nearest(str(on_mismatch), ('warn', 'raise', 'ignore'))}"
        )
    _follow(policy)
    wanted = [one for one in observers(policy._hooked.bound) if not one.only_in_forward]
    if keep is not None:
        kept = set(kept_keys(policy, keep))
        wanted = [one for one in wanted if not kept.isdisjoint(map(key_parts, one.result_keys))]
        data = only_kept(policy, data, keep)
    if not wanted:
        return shallow_copy(data)
    require_dense_inputs(policy, data)
    found = Found(policy, data, wanted)
    if found.missing:
        for results in _computed(policy, data, found.missing, chunk_size, on_mismatch, laid_out):
            found.add(results)
    return only_kept(policy, found.together(shallow_copy(data)), keep)


def computed(policy: HookedPolicy, data: TensorDictBase, laid_out: str = "") -> dict[NestedKey, Tensor]:
    """By key the results of every row, as :func:`annotate` computes them, whatever the batch holds.

    For who reads them and puts them away: nothing says which rows have one, and whose they are.
    """
    _follow(policy)
    wanted = [one for one in observers(policy._hooked.bound) if not one.only_in_forward]
    parts = _computed(policy, data, wanted, None, "ignore", laid_out)
    return {key if len(key) > 1 else key[0]: value for results in parts for key, value in results.items()}


def _follow(policy: HookedPolicy) -> None:
    """Be the user's policy as it is now, before it is asked which results of a batch are its own."""
    policy._hooked.runtime.require_active()
    if policy._hooked.tie is not None:
        policy._hooked.tie.check(policy)


def _computed(
    policy: HookedPolicy,
    data: TensorDictBase,
    missing: Sequence[BoundMethod],
    chunk_size: int | None,
    on_mismatch: OnMismatch,
    laid_out: str,
) -> Iterator[Results]:
    """The results of methods, of some of them at a time."""
    _require_computable(policy, data)
    mismatch = Mismatch(policy, on_mismatch)
    selected = _select(policy, data, missing)
    effects = effects_of(policy)
    noise = None
    if not effects.quiet() or any(one.may_draw for one in missing):
        others = not effects.watch.idle or any(one.asks_functions for one in missing)
        noise = PassNoise(data.device or effects.device, others=others)
    for part, run, size in _parts(missing, data, chunk_size):
        analysis = _Analysis(policy, part, mismatch, noise, laid_out)
        if run is _trajectories and data.ndim and policy._hooked.traits.recurrent:
            analysis.pieces = pieces(policy, data.reshape(-1, data.batch_size[-1]))
        yield run(policy, selected, analysis, size)
    mismatch.report(data)


def _require_computable(policy: HookedPolicy, data: TensorDictBase) -> None:
    """Raise if there are no rows, or they do not hold what the policy saw."""
    if data.batch_size.numel() == 0:
        raise InputError(f"there is nothing to annotate: the batch has no rows, its shape is {tuple(data.batch_size)}")
    require_inputs(policy, data)  # of all entries: what is computed with has only those that are read
    if policy._hooked.noise:
        for key in masks_needed(policy):
            if data.get(key, None) is None:
                raise MissingKeyError(
                    f"the rows were decided under a dropout mask that the data does not hold ({key!r}), so they cannot "
                    "be explained by it: keep it with the data, or explain while the policy acts, with when='step'"
                )
    require_as_seen(policy, data, "explain it while it acts, with when='step'")


def _parts(
    missing: Sequence[BoundMethod], data: TensorDictBase, chunk_size: int | None
) -> Iterator[tuple[list[BoundMethod], Callable[..., Results], int | None]]:
    """Methods that are computed together, how, and with how many rows at once."""
    first = missing[0] if len(missing) == 1 else None
    if first is not None and first.horizon == "step" and not first.whole_batch:  # as most are
        yield [first], _rows, chunk_size
        return
    for horizon, run in (("step", _rows), ("trajectory", _trajectories)):
        group = [one for one in missing if one.horizon == horizon]
        # A mean over the batch cannot be taken chunk by chunk.
        whole = [one for one in group if one.whole_batch]
        by_row = [one for one in group if one not in whole]
        for part, size in ((whole, data.batch_size.numel()), (by_row, chunk_size)):
            if part:
                yield part, run, size


class _Analysis:
    """Computes the results of one chunk.

    Between two chunks other threads have their turn: what is changed for a pass is changed for one chunk.
    """

    def __init__(
        self,
        policy: HookedPolicy,
        bound: Sequence[BoundMethod],
        mismatch: Mismatch,
        noise: PassNoise | None,
        laid_out: str,
    ) -> None:
        self.policy = policy
        self.bound = list(bound)
        self.mismatch = mismatch
        self.noise = noise
        self.through_time = False  # whole trajectories, in the recurrent mode
        self.pieces: list[Tensor] | None = None  # rows by trajectory, where lines hold several
        self.laid_out = laid_out  # how rows are computed in another layout than that of the data
        self.forward: Callable[..., Any] = type(policy)._base.forward

    def __call__(self, chunk: TensorDictBase) -> Results:
        policy = self.policy
        traits = policy._hooked.traits
        with policy._hooked.runtime.lock, policy._hooked.runtime.held:
            if self.noise is None and not traits.recurrent and not traits.batch_statistics:
                return self._compute(chunk)
            noise = nullcontext() if self.noise is None else self.noise.under_way()
            with _recurrent_mode(policy, self.through_time), policy._frozen_statistics(), noise:
                return self._compute(chunk)

    def _compute(self, chunk: TensorDictBase) -> Results:
        policy, runtime = self.policy, self.policy._hooked.runtime
        call = Call(policy, self.forward, chunk, stored_inputs(policy, chunk))
        runtime.level = vmap_level()
        try:
            require_repeatable(call)
            if self.laid_out:
                require_rows_apart(call, self.laid_out)
            call.compares = runtime.level < 0 and self.mismatch.can_compare(chunk)
            if any(one.reads_forward for one in self.bound):
                with torch.no_grad():
                    call.replay(record=True, as_it_was=True)
            computed = policy._compute(self.bound, call)
            # Paths and perturbations never run the policy on the data as it was.
            if call.replayed is None and call.compares:
                with torch.no_grad():
                    if not replay_chain(call):
                        call.replay(as_it_was=True)
            self.mismatch.compare(call)
            return computed
        except RuntimeError as error:
            # What is kept from the last call may have its number of rows.
            kept = None if isinstance(error, TdhookError) else effects_of(policy).kept_tensors()
            if kept is None:
                raise
            raise InputError(
                f"{type(policy)._base.__name__} fails on {chunk.batch_size.numel()} rows of a batch ({error}). "
                f"It keeps {kept} from its last call, which may be state of other rows: explain it while it acts, with "
                "when='step', or let its state be read from the data"
            ) from error
        finally:
            runtime.slots.clear()
            policy._close_routes()


def _select(policy: HookedPolicy, data: TensorDictBase, missing: Sequence[BoundMethod]) -> TensorDictBase:
    """What the passes read, and what schedules decide once for the whole batch."""
    selected = rows_read(policy, data, keys_read(policy, missing))
    plans = [one.plan for one in missing if one.plan is not None]
    if plans:
        selected = shallow_copy(selected)
        for plan in plans:
            selected.set(*plan(selected))
    return selected


def _rows(policy: HookedPolicy, data: TensorDictBase, analysis: _Analysis, chunk_size: int | None) -> Results:
    if chunk_size is None and policy._hooked.traits.convolutional:
        chunk_size = conv_chunk((data.get(key, None) for key in policy.policy_in_keys), data.batch_size)
    dims = data.ndim
    if dims == 0 or (dims == 1 and chunk_size is None):
        return analysis(data)
    flat = data.reshape(-1) if dims > 1 else data
    rows = chunk_size or len(flat)
    if dims > 1:
        analysis.laid_out = f"a batch of shape {tuple(data.batch_size)} is computed as {len(flat)} rows"
    elif rows < len(flat):
        analysis.laid_out = f"{len(flat)} rows are computed {rows} at a time"
    found = _in_parts(flat, rows, analysis)
    batch = data.batch_size
    return found if dims == 1 else {key: _with_batch(value, batch) for key, value in found.items()}


def _in_parts(data: TensorDictBase, rows: int, analysis: _Analysis) -> Results:
    if len(data) <= rows:
        return analysis(data)
    parts = [analysis(data[start : start + rows]) for start in range(0, len(data), rows)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _with_batch(value: Tensor, batch: torch.Size) -> Tensor:
    return value.reshape((*batch, *value.shape[1:]))


def _trajectories(policy: HookedPolicy, data: TensorDictBase, analysis: _Analysis, chunk_size: int | None) -> Results:
    if data.ndim == 0:
        raise InputError(
            "horizon='trajectory' explains whole trajectories, but the data has no batch dimension: its last batch "
            "dimension is time"
        )
    steps = data.batch_size[-1]
    analysis.through_time, analysis.laid_out = True, ""
    if analysis.pieces is None:
        found = _lines(data.reshape(-1, steps), analysis, chunk_size)
        return {key: value.reshape((*data.batch_size, *value.shape[2:])) for key, value in found.items()}
    flat = data.reshape(-1)
    parts = [_lines(flat[rows], analysis, chunk_size) for rows in analysis.pieces]
    order = torch.cat([rows.reshape(-1) for rows in analysis.pieces]).argsort()
    found = {key: torch.cat([part[key].flatten(0, 1) for part in parts]) for key in parts[0]}
    return {key: value[order.to(value.device)].reshape((*data.batch_size, *value.shape[1:]))
            for key, value in found.items()}  # fmt: skip


def _lines(data: TensorDictBase, analysis: _Analysis, chunk_size: int | None) -> Results:
    """Trajectories ``(lines, time)``, as many at once as have so many rows."""
    return _in_parts(data, len(data) if chunk_size is None else max(1, chunk_size // data.batch_size[1]), analysis)


def _recurrent_mode(policy: HookedPolicy, mode: bool) -> AbstractContextManager[Any]:
    if not policy._hooked.traits.recurrent or policy._hooked.traits.read_trajectories(policy) is mode:
        return nullcontext()
    from torchrl.modules import set_recurrent_mode

    return set_recurrent_mode(mode)
