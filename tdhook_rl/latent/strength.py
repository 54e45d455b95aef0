"""How strongly an intervention acts, in which rows, and what is written of it.

An intervention may have a strength (``alpha=``) and conditions (``when=``). Where these differ by row,
``("steered", name)`` says in which rows it acted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.bound import PATIENCE, BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, MissingKeyError, SiteError, warn
from tdhook_rl.latent.gates import AtSteps, ProbeGate, RowFunction, place_probe
from tdhook_rl.method import Binder
from tdhook_rl.sites.inner_calls import takes_steps
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.repeats import Several
from tdhook_rl.sites.row_values import Record, spread
from tdhook_rl.sites.runtime import Runtime

RowsFunction: TypeAlias = Callable[[TensorDictBase], Tensor]
Condition: TypeAlias = str | tuple[str, ...] | ProbeGate | AtSteps | RowFunction | RowsFunction
#: One condition, or several that must hold together.
When: TypeAlias = Condition | Sequence[Condition] | None
Strengths: TypeAlias = float | Tensor | str | tuple[str, ...] | RowFunction | RowsFunction


class Source:
    """Where a hook finds a tensor at run time: a control, an entry of the data for each row, or what was found of it.

    Args:
        runtime: what the hooks share.
        what: how messages call it.
        control, row, slot: the name of the control, the key of the entry, or what a function or probe is found under.
        found: the slot of the record that stands in the place of a function where a call is explained.
        probe: the module that is read, for a probe.
    """

    def __init__(
        self,
        runtime: Runtime,
        what: str,
        *,
        control: str | None = None,
        row: NestedKey | None = None,
        slot: str = "",
        found: str = "",
        probe: str | None = None,
    ) -> None:
        self.runtime = runtime
        self.what = what
        self.control = control
        self.row = row
        self.slot = slot
        self.found = found
        self.probe = probe

    @property
    def by_row(self) -> bool:
        return self.control is None

    def read(self, site: str) -> Tensor:
        """What it is in the call under way, for a hook at a site."""
        runtime = self.runtime
        if self.control is not None:
            return runtime.held[self.control]
        if self.probe is None and takes_steps(runtime, site) and runtime.batch[-1] > 1:  # type: ignore[index]
            raise InputError(
                f"{self.what} is known of each step of the batch {tuple(runtime.batch or ())}, but {site!r} is handed "
                "tensors of one step at a time, which do not say of which: give a number for all, or call the policy "
                "with one step (data[..., :1])"
            )
        if self.row is not None:
            value = runtime.rows.get(self.row, None)
        else:
            decided = runtime.decided or {}
            value = decided.get(self.found, decided.get(self.slot, None))
        if value is not None:
            return value
        if self.probe is not None:
            raise SiteError(
                f"{self.what} reads a probe of {self.probe!r}, which has not run when {site!r} is changed: a condition "
                "is decided by a module that runs before, or by the same module before it is changed"
            )
        read = f"reads the per-row key {self.row!r}" if self.row is not None else f"asks the function {self.what}"
        raise MissingKeyError(f"steering {site!r} {read}: call the policy with a TensorDict that has what it reads")

    def in_call(self, data: TensorDictBase, slots: Mapping[str, Any]) -> Tensor | None:
        """What it was in a forward that has just run; ``None`` for a probe whose module did not run."""
        if self.control is not None:
            return self.runtime.held[self.control]
        batch = data.batch_size
        if self.row is not None:
            value = required(data, self.row, f"{self.what} reads")
        else:
            value = slots.get(self.slot)
            if isinstance(value, Several):
                value = value.chosen(batch, self.slot)
        if value is None:
            return None
        if value.shape == (*batch, 1):
            value = value.squeeze(-1)
        if value.shape[: len(batch)] != batch and value.shape == batch[len(batch) - value.ndim :]:
            value = value.expand(batch)  # several samples of each row
        return value.detach()


def where_it_acts(acts: Tensor | bool, new: Tensor, value: Tensor) -> Tensor:
    """``new`` where an intervention acts (everywhere, nowhere, or by row), and ``value``, bit for bit, elsewhere.

    Not a product: 0 * inf is NaN, and x + 0 turns -0.0 into 0.0.
    """
    if isinstance(acts, bool):
        return new if acts else value
    return torch.where(acts, new, value)


class Strength:
    """The strength of one intervention in the call under way, and the rows in which it acts."""

    def __init__(self, runtime: Runtime, name: str, slot: str) -> None:
        self.runtime = runtime
        self.name = name
        self.slot = slot  # of the record
        self.ran = f"{slot}:ran"
        self.alpha: Source | None = None
        self.conditions: list[Source] = []
        self.recorded = False

    @property
    def by_row(self) -> bool:
        return bool(self.conditions) or (self.alpha is not None and self.alpha.by_row)

    def off(self) -> bool:
        """Whether it acts nowhere, as its strength is the number 0; a traced call does not ask."""
        alpha = self.alpha
        if alpha is None or alpha.control is None or torch.compiler.is_compiling():
            return False
        return self.runtime.held[alpha.control].item() == 0

    def at(self, value: Tensor, site: str) -> tuple[Tensor | None, Tensor | bool]:
        """The strength (``None`` for an intervention that has none), and where it acts, see :func:`where_it_acts`."""
        alpha: Tensor | None = None
        acts: Tensor | bool = True
        if self.alpha is not None:
            alpha = self.alpha.read(site)
            alpha = in_dtype(alpha, value, self.alpha.what, site, factor=True)
            # A traced call does not ask: each number would be compiled for.
            by_row = self.alpha.by_row or torch.compiler.is_compiling()
            acts = True if by_row else alpha.item() != 0
            if by_row:
                alpha = spread(alpha, value, self.alpha.what, site) if self.alpha.by_row else alpha
                acts = alpha != 0
        if self.conditions:
            found = (self.runtime.decided or {}).get(self.slot, None)
            for one in self.conditions if found is None else [None]:
                truths = found if one is None else one.read(site)
                if truths.dtype != torch.bool:
                    raise InputError(f"{one.what if one else self.name} is {truths.dtype}; it must be boolean")
                truths = spread(truths.to(value.device), value, one.what if one else self.name, site)
                acts = truths if acts is True else truths & acts
        if self.recorded and self.runtime.recording:
            self.runtime.slots[self.ran] = True if self.conditions else acts
        return alpha, acts

    def changed(self, value: Tensor, new: Tensor, site: str) -> Tensor:
        """``new`` where an intervention without a strength acts, and ``value``, bit for bit, elsewhere."""
        return where_it_acts(self.at(value, site)[1], new, value)

    def opened(self, data: TensorDictBase, slots: Mapping[str, Any]) -> Tensor:
        """In a forward that has just run: the rows in which all conditions held."""
        found = None
        for one in self.conditions:
            truths = one.in_call(data, slots)
            truths = torch.zeros(data.batch_size, dtype=torch.bool) if truths is None else truths
            found = truths if found is None else _both(found, truths)
        return torch.ones(data.batch_size, dtype=torch.bool) if found is None else found

    def acted(self, data: TensorDictBase, slots: Mapping[str, Any]) -> Tensor:
        """In a forward that has just run: the rows in which it acted."""
        ran = slots.get(self.ran)
        if isinstance(ran, Tensor) and ran.numel() == data.batch_size.numel() and data.device in (None, ran.device):
            return ran.reshape(data.batch_size)  # as the hook has found it
        alpha = None if self.alpha is None else self.alpha.in_call(data, slots)
        if self.ran not in slots or (alpha is None and self.alpha is not None):
            return torch.zeros(data.batch_size, dtype=torch.bool, device=data.device)
        opened = self.opened(data, slots) if self.conditions else None
        if opened is None:
            found: Tensor = alpha != 0  # type: ignore[assignment, operator]
        else:
            found = opened.clone() if alpha is None else _both(opened, alpha != 0)  # a key's own entry stays its own
        return found if data.device is None else found.to(data.device)

    def strength(self, data: TensorDictBase, slots: Mapping[str, Any]) -> Tensor:
        """In a forward that has just run: the strength in each row, where that is a function of the rows."""
        alpha = None if self.alpha is None else self.alpha.in_call(data, slots)
        if alpha is None:
            return torch.zeros(data.batch_size, device=data.device)
        return alpha.to(data.device) if data.device is not None else alpha.clone()


def place_strength(
    binder: Binder, name: str, when: When, root: str, alpha: Strengths | None = None
) -> tuple[Strength, BoundSteered | None]:
    """Bind the strength and the conditions of an intervention; and what writes where it acted, if that differs by row.

    Args:
        binder: of the policy.
        name: of the intervention, the prefix of its controls.
        when: its conditions.
        root: where it is written.
        alpha: its strength, ``None`` for one that has none.
    """
    strength = Strength(binder.runtime, name, f"{binder.owner()}:{name}")
    runtime, found = binder.runtime, f"{strength.slot}:alpha"
    records = [Record((root, name), strength.slot, strength.acted)]
    if is_key(alpha):
        key = binder.read_row(alpha, finite=True)
        strength.alpha = Source(runtime, f"the per-row alpha {key!r}", row=key)
    elif callable(alpha):
        what = f"alpha= of {name!r}"
        function, reads = _function(alpha)
        slot = binder.read_rows(function, what, truths=False, found=found, reads=reads)
        strength.alpha = Source(runtime, what, slot=slot, found=found)
        records.append(Record((root, f"{name}.alpha"), found, strength.strength))
    elif alpha is not None:
        strength.alpha = Source(runtime, "alpha", control=binder.control(f"{name}.alpha", float(alpha)))
    for number, one in enumerate(_conditions(when)):
        what = f"when= of {name!r}"
        if isinstance(one, ProbeGate):
            prefix = f"{name}.gate" if number == 0 else f"{name}.gate{number}"
            slot = place_probe(binder, one, prefix, strength.slot)
            source = Source(runtime, what, slot=slot, probe=one.probe.path)
        elif is_key(one):
            source = Source(runtime, f"the per-row key {one!r} ({what})", row=binder.read_row(one))
        else:
            function, reads = _function(one)
            slot = binder.read_rows(function, what, truths=True, found=strength.slot, reads=reads)
            source = Source(runtime, what, slot=slot)
        strength.conditions.append(source)
    if not strength.by_row:
        return strength, None
    strength.recorded = True
    binder.records += records
    latest = max((max(one.steps) for one in _conditions(when) if isinstance(one, AtSteps)), default=0)
    return strength, BoundSteered(strength, records, max(PATIENCE, 2 * latest))


class BoundSteered(BoundMethod):
    """Writes where an intervention acted."""

    # What acted when a batch was collected cannot be found out afterwards.
    only_in_forward = True

    def __init__(self, strength: Strength, records: list[Record], patience: int) -> None:
        self._strength = strength
        self._records = records
        self._patience = patience
        self._silent: int | None = 0 if strength.conditions else None  # calls so far in which no condition held
        self.result_keys = tuple(record.key for record in records)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if self._silent is not None and not torch.compiler.is_compiling() and self._strength.runtime.level < 0:
            self._notice(bool(self._strength.opened(call.data, call.slots).any()))
        return {record.key: record.find(call.data, call.slots) for record in self._records}

    def _notice(self, opened: bool) -> None:
        silent = None if opened else (self._silent or 0) + 1
        self._silent = silent
        if silent == self._patience:
            self._silent = None  # once is enough
            warn(
                f"when= of {self._strength.name!r} has not held in any row of the first {silent} calls, so that it has "
                "changed nothing"
            )


def is_key(given: Any) -> bool:
    """Whether it is the key of an entry."""
    return isinstance(given, str) or (
        isinstance(given, tuple) and bool(given) and all(isinstance(part, str) for part in given)
    )


def is_function(given: Any) -> bool:
    """Whether it may be a function of rows. A module has weights, which would not follow those of the policy."""
    return callable(given) and not isinstance(given, (type, nn.Module))


def _conditions(when: When) -> list[Any]:
    if when is None:
        return []
    if not isinstance(when, (list, tuple)) or is_key(when):
        return [when]
    # YAML has no tuples: a list inside the list is a nested key.
    return [tuple(one) if isinstance(one, list) and is_key(tuple(one)) else one for one in when]


def as_strength(alpha: Any) -> Any:
    """A strength as one finite number, or what gives each row its own.

    Raises:
        InputError: for what is neither.
    """
    if is_key(alpha) or isinstance(alpha, RowFunction) or is_function(alpha):
        return alpha
    try:
        number = torch.as_tensor(alpha, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        number = torch.full((), torch.nan)
    if number.numel() > 1:
        raise InputError(
            f"alpha= holds {number.numel()} numbers, but it is one strength for every row of every batch: put a "
            'strength for each row into the data, data["alpha"] = ..., and give its key, alpha="alpha"'
        )
    if number.numel() != 1 or not bool(torch.isfinite(number)):
        raise InputError(
            f"alpha= is a finite number, or the TensorDict key or a function of one for each row, got {alpha!r:.80}"
        )
    return float(number)


def require_conditions(when: When) -> None:
    """Raise :class:`InputError` for what is no condition.

    Example:
        >>> require_conditions(["open", lambda rows: rows["step_count"] < 10])
    """
    if isinstance(when, (list, tuple)) and not when:
        raise InputError("when=[] has no condition: leave it out to act in every row")
    for one in _conditions(when):
        if not (is_key(one) or isinstance(one, (ProbeGate, RowFunction)) or is_function(one)):
            raise InputError(
                "when= is a boolean key of each row, a function of the TensorDict of the rows, AtSteps(...), "
                f"ProbeGate(...), or a list of them that must hold together; got {one!r:.80}"
                + (
                    ". Of a list in Hydra's YAML, write _convert_: all beside _target_"
                    if isinstance(one, Mapping)
                    else ""
                )
            )


def _function(given: Any) -> tuple[Callable[..., Any], Sequence[NestedKey]]:
    """A function of rows, and what it is known to read."""
    if isinstance(given, RowFunction):
        return given.function, given.reads
    return given, given.reads if isinstance(given, AtSteps) else ()


def _both(one: Tensor, other: Tensor) -> Tensor:
    """Both of two booleans for each row, of which either may tell agents apart too."""
    other = other.to(one.device)
    for _ in range(other.ndim - one.ndim):
        one = one.unsqueeze(-1)
    for _ in range(one.ndim - other.ndim):
        other = other.unsqueeze(-1)
    return one & other
