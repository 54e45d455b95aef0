"""What interventions know of each row: entries of the data, and what functions of the user's make of it.

It is read where the policy is entered with a TensorDict, and lent to the hooks inside. Functions are called once in
each call of the policy. In a pass that explains a call, what was found in that call stands in their place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.keys import get_entry, is_tensordict, missing
from tdhook_rl.errors import InputError
from tdhook_rl.internals.functorch_names import is_batchedtensor
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.inner_calls import batch_at, require_whole_batch, step_of_batch
from tdhook_rl.sites.repeats import Several, added
from tdhook_rl.sites.rows import entry_rows, with_batch
from tdhook_rl.sites.runtime import Runtime

#: What to do where a function of rows reads what they lack.
ROWS_REMEDY = (
    "StepCounter() counts steps, a TensorDictPrimer adds any key to an environment; losses and servers that hand on "
    "the policy's in_keys only are told of it by RowFunction(function, reads=[...])"
)


@dataclass(frozen=True)
class RowFunction:
    """A function of the rows whose value, one or more numbers for each row, hooks find under ``slot``.

    Args:
        slot: its name in ``Runtime.decided``, and in the slots of the call.
        what: how messages call it, such as ``"when= of 'steering'"``.
        function: the user's, given a copy of the TensorDict.
        truths: whether it says yes or no; else it gives numbers.
        reads: the entries that it is known to read; no others are handed to it. Empty where that is not known.
        found: the slot under which an explained call hands on what came of it, which is then not asked again.
    """

    slot: str
    what: str
    function: Callable[[TensorDictBase], Tensor]
    truths: bool
    reads: tuple[NestedKey, ...]
    found: str

    def __call__(self, data: TensorDictBase) -> Tensor:
        rows = data.select(*self.reads, strict=False) if self.reads else data.copy()
        value = self._checked(
            asked(self.function, rows, what=self.what, remedy=ROWS_REMEDY, reads_only=True), data.batch_size
        )
        if not self.truths:
            require_finite(value, self.what)
        return value

    def _checked(self, value: Any, batch: torch.Size) -> Tensor:
        kind = "a boolean" if self.truths else "a number"
        if not isinstance(value, Tensor) or (value.dtype == torch.bool) is not self.truths or value.is_complex():
            got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise InputError(f"{self.what} gives {kind} for each row, as a tensor, but it returned {got}")
        value = value.detach() if value.requires_grad else value
        if value.shape == (*batch, 1):
            value = value.squeeze(-1)
        if value.shape[: len(batch)] != batch:
            raise InputError(
                f"{self.what} gives {kind} for each row of the batch {tuple(batch)}, but it returned a tensor of shape "
                f"{tuple(value.shape)}"
            )
        return value if self.truths or value.is_floating_point() else value.to(torch.get_default_dtype())


@dataclass(frozen=True)
class Record:
    """What is written of how an intervention acted, and read back where the call is explained.

    Args:
        key: the entry of the data.
        slot: its name in ``Runtime.decided`` during such a pass.
        find: what it is, from the data of a forward that has just run and the slots of that.
    """

    key: tuple[str, ...]
    slot: str
    find: Callable[[TensorDictBase, Mapping[str, Any]], Tensor]


class RowHook:
    """Pre-hook and hook of a TensorDict-level module: lends what is known of rows to the hooks inside it.

    It sits on the modules below the root because ``get_dist`` skips the root's hooks.

    Args:
        runtime: what the hooks share.
        keys: entries that hooks read.
        finite: those of them that must hold finite numbers.
        functions: functions that hooks read.
        records: what passes read in the place of functions.
    """

    def __init__(
        self,
        runtime: Runtime,
        keys: Sequence[NestedKey],
        finite: Sequence[NestedKey],
        functions: Sequence[RowFunction],
        records: Sequence[Record],
    ) -> None:
        self.runtime = runtime
        self.keys = tuple(keys)
        self.finite = frozenset(finite)
        self.functions = tuple(functions)
        self.recorded = tuple((one.key, one.slot) for one in records)

    def before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        data = args[0] if args else kwargs.get("tensordict")
        if not is_tensordict(data):
            return
        rows = self.runtime.rows
        for key in self.keys:
            value = get_entry(data, key)
            if value is None:
                remedy = ". Set it on every step: StepCounter() counts steps, a TensorDictPrimer adds any key"
                raise missing(data, key, "a steered policy reads the per-row key", remedy)
            known = rows.get(key)
            if known is value:
                continue
            if key in self.finite and known is None:
                require_finite(value, f"the per-row key {key!r}")
            rows[key] = entry_rows(value, module, self.runtime)
        self.decide(module, args, kwargs)

    def decide(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Ask the functions, unless they were asked in this call."""
        runtime, data = self.runtime, args[0] if args else kwargs.get("tensordict")
        if not (self.functions or self.recorded) or not is_tensordict(data):
            return
        if runtime.decided is None:  # a module of the policy is called by itself
            runtime.decided = {}
        decided, replay, batch = runtime.decided, runtime.replay, data.batch_size
        known = decided.get("rows")
        if known is not None and not self._is_of_other_rows(data):
            layout = module._hooked_layout
            if known.numel() == batch.numel() or (layout is not None and layout.mapped is not None):  # type: ignore[union-attr]
                return
        elif replay is not None and not replay.is_forward:
            for key, slot in self.recorded:
                value = data.get(key, None)
                if value is not None:
                    decided[slot] = value
        decided["rows"] = batch
        source = data if replay is None or replay.stored.batch_size != batch else replay.stored
        for one in self.functions:
            if one.found in decided:
                continue
            decided[one.slot] = value = one(source)
            keep(runtime, one.slot, value, one.what)

    def _is_of_other_rows(self, data: TensorDictBase) -> bool:
        """Whether a module that the policy calls with rows of its own (a step, some rows) has been given others now.

        What it hands on to modules inside of it is of the same rows.
        """
        runtime, inner = self.runtime, self.runtime.inner
        if not inner or inner[-1] != data.batch_size or runtime.batch is None or runtime.decided is None:
            return False
        if data.batch_size.numel() == runtime.batch.numel():
            return False
        depth, last = runtime.decided.get("asked", (0, None))
        if last is data or (last is not None and len(inner) > depth):
            return False
        runtime.decided["asked"] = len(inner), data
        return True

    def after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        # Inside a root call the root takes the rows back; after get_dist nobody else would.
        if not self.runtime.depth:
            self.runtime.rows.clear()
        if self.runtime.runs is None:  # outside of any call of the policy
            self.runtime.decided = None


def rows_under_way(runtime: Runtime, site: str, what: str) -> TensorDictBase:
    """The rows that the policy is running on, for a function of the user's: a locked copy.

    In a pass that explains a call, the inputs are those of the pass and other entries those of the call.

    Raises:
        InputError: if it was not called with a TensorDict, or is called with a part of the rows.
    """
    source, replay = runtime.source, runtime.replay
    if not isinstance(source, TensorDictBase):
        raise InputError(f"{what} takes the rows at {site!r}: call the policy with a TensorDict")
    require_whole_batch(runtime, site)
    rows = source.copy()
    if replay is not None and replay.stored.batch_size == source.batch_size:
        rows = replay.stored.copy()
        for key, value in source.items(True, True):
            rows.set(key, value)
    return rows if torch.compiler.is_compiling() else rows.lock_()


def keep(runtime: Runtime, slot: str, value: Tensor, site: str) -> None:
    """Keep what was found of rows in the call under way, for what is written of it; ``site`` says where, or of what."""
    if not runtime.recording:
        return
    before = runtime.slots.get(slot)
    if isinstance(before, Tensor) and _some_rows(runtime):
        return  # of all rows, before some of them were handed on
    if (runtime.inner or runtime.steps) and step_of_batch(runtime, site):
        # What was found of the whole, before it was walked through, is none of a step's.
        value = added(before if isinstance(before, Several) else None, value, "steps")  # type: ignore[assignment]
    runtime.slots[slot] = value


def _some_rows(runtime: Runtime) -> bool:
    """Whether a module is called with some rows of the batch, and no step of it."""
    inner, batch = runtime.inner[-1] if runtime.inner else None, runtime.batch
    if inner is None or batch is None or inner == batch[:-1]:
        return False
    return inner.numel() < batch.numel()


def spread(rows: Tensor, value: Tensor, what: str, site: str) -> Tensor:
    """Numbers of rows in the shape in which they are broadcast over what a site computed.

    Raises:
        InputError: if they are not one for each row, or for each agent of each row.
    """
    if rows.ndim and rows.shape[-1] == 1 and rows.shape != value.shape[: rows.ndim]:
        rows = rows.squeeze(-1)  # as TorchRL has rewards, ends and counts of steps, of a single environment too
    if rows.shape != value.shape[: rows.ndim] and rows.ndim and value.shape[0] == rows.numel():
        rows = rows.reshape(-1)  # convolutional nets flatten the leading dimensions
    if rows.shape != value.shape[: rows.ndim]:
        raise InputError(
            f"{what} has shape {tuple(rows.shape)}, which does not start the shape {tuple(value.shape)} of {site!r}: "
            "give one number for each row of the batch"
        )
    return rows.reshape((*rows.shape, *(1,) * (value.ndim - rows.ndim)))


def require_whole_rows(value: Tensor, runtime: Runtime, site: str) -> None:
    """Refuse what a module computed of other rows than those of the call, where what is put in is of these, in order.

    A network that is handed some of the rows may give as many of other states.

    Raises:
        InputError: if it does not start with the batch shape.
    """
    batch = batch_at(runtime, site)
    if batch is not None:
        with_batch(value, batch, site)


def require_finite(value: Tensor, what: str) -> None:
    """Raise :class:`InputError` for NaN or infinite numbers, where they can be looked at."""
    if torch.compiler.is_compiling() or value.is_meta or is_batchedtensor(value) or not value.is_floating_point():
        return
    # The sum is cheaper, and not finite if an entry is not.
    if not math.isfinite(value.detach().sum().item()) and not bool(torch.isfinite(value).all()):
        raise InputError(f"{what} has NaN or infinite values")


def portable_rows(function: Callable[..., Any], what: str) -> Callable[[TensorDictBase], Tensor]:
    """A function of rows as it travels to workers.

    Raises:
        InputError: if it is not called with one argument.
    """
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise InputError(
            f"{what} is called with one argument, the TensorDict of the rows, which {function!r} does not take"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    return Portable(function)
