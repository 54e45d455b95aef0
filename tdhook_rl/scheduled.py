"""Schedules: an observing method that computes some rows only, and says which.

The keys stay what they are at every step; where a row was left out its values are NaN (0 for integers) and its
``("computed", root)`` mask is false.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.arguments.keys import required
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.calls.bound import PATIENCE, BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.calls.real_rows import without_other_rows
from tdhook_rl.calls.repeatable import coupled
from tdhook_rl.errors import InputError, warn
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.missing import missing_value

__all__ = ["Scheduled"]

#: What others ask of a bound method, and a schedule answers as its method does.
TAKEN_OVER = (
    "when", "horizon", "reads_forward", "replays", "may_draw", "asks_functions", "whole_batch", "only_in_forward",
    "without_forward", "consumes", "store", "last",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scheduled(Method):
    """Compute an observing method for some calls or rows only.

    Args:
        method: a method that writes results, such as ``Saliency(when="step")``.
        every: every how many calls it computes, the first included. A call is a forward of the policy for methods
            that run per step (counted in each process for itself), and an annotated batch for the others.
        fraction: the share of rows, drawn anew in each call; at least one row. The generators of torch are not
            touched.
        where: a boolean key of the data: the rows to compute. For methods that run per step the environment or
            the policy writes it before the policy's forward ends.
        seed: of the draws.

    Writes the keys of the method, at every step.

    Raises:
        InputError: for a method that writes nothing, or numbers out of range.
        MissingKeyError: if ``where`` is absent.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import Saliency
        >>> data = TensorDict({"input": torch.randn(8, 4)}, batch_size=8)
        >>> with Scheduled(Saliency(), fraction=0.25).prepare(torch.nn.Linear(4, 2)) as hooked:
        ...     found = hooked(data)
        >>> int(found["computed", "attr"].sum()), int(found["attr", "input"].isnan().all(-1).sum())
        (2, 6)
    """

    method: Method
    every: int = 1
    fraction: float = 1.0
    where: NestedKey | None = None
    seed: int = 0

    by_row = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or len(self.method._methods()) != 1:
            raise InputError(f"Scheduled takes one method, such as Saliency(); got {self.method!r}")
        require_counts(every=self.every)
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction= is above 0 and at most 1, got {self.fraction!r}")
        if self.every == 1 and self.fraction == 1 and self.where is None:
            raise InputError("Scheduled leaves nothing out: give every=, fraction= or where=")

    def bind(self, binder: Binder) -> _BoundScheduled:
        bound = self.method.bind(binder) if self.method.observes else None
        if bound is None or not bound.result_keys:
            raise InputError(
                f"{type(self.method).__name__} writes no results, so there is nothing to schedule; an intervention is "
                "switched by its controls, or row by row with when="
            )
        bound.method_name = type(self.method).__name__
        return _BoundScheduled(self, bound, binder.owner())


class _BoundScheduled(BoundMethod):
    exclusive = True  # its mask speaks for a root of its own

    def __init__(self, config: Scheduled, bound: BoundMethod, owner: str) -> None:
        self.bound = bound
        for name in TAKEN_OVER:
            setattr(self, name, getattr(bound, name))
        self._method = bound.compiled or bound
        self._name = bound.method_name
        self._every, self._fraction, self._seed = config.every, config.fraction, config.seed
        self._where = None if config.where is None else unravel_key(config.where)
        self._plan_key = ("tdhook_rl schedule", owner)
        self._counts = {"step": 0, "batch": 0}
        self._silent = 0  # calls in a row without a selected row
        self._forms: dict[tuple[str, ...], tuple[torch.Size, torch.dtype]] = {}
        self.reads = [*bound.reads, *([] if self._where is None else [self._where])]

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        return self.bound.result_keys

    def plan(self, data: TensorDictBase) -> tuple[tuple[str, ...], Tensor]:
        """For ``annotate``: which rows of the whole batch are computed, and the key it is handed on under."""
        return self._plan_key, self._select(data, "batch")

    def compute(self, call: Call) -> Mapping[tuple[str, ...], Tensor]:
        if torch.compiler.is_compiling():
            raise InputError(
                f"the schedule of {self._name} counts calls and picks rows, which one compiled graph cannot: compute "
                "every step, or per batch with annotate"
            )
        rows = call.data.get(self._plan_key, None)
        rows = self._select(call.data, "step") if rows is None else rows
        results = self._compute(call, rows)
        masks = {("computed", root): rows.clone() for root in dict.fromkeys(key[0] for key in results)}
        return results | masks

    def _compute(self, call: Call, rows: Tensor) -> dict[tuple[str, ...], Tensor]:
        batch = call.batch_size
        if bool(rows.all()):
            return self._learned(call, len(batch))
        if self.reads_forward or self.horizon == "trajectory" or not batch or coupled(call):
            # What the forward has captured is there anyway; a trajectory cannot be explained in part, and neither can
            # rows that meet, or the noise that was drawn for all of them.
            if not bool(rows.any()) and self._forms:
                return self._blank(batch, call.data.device)
            return without_other_rows(self._learned(call, len(batch)), rows)
        if not bool(rows.any()) and self._forms:
            return self._blank(batch, call.data.device)
        chosen = rows
        if not bool(rows.any()):  # one row shows the shapes of the results
            chosen = torch.zeros_like(rows)
            chosen.view(-1)[0] = True
        found = self._learned(call.part(chosen), 1)
        filled = self._blank(batch, call.data.device)
        if bool(rows.any()):
            for key, value in found.items():
                filled[key][chosen] = value
        return filled

    def _learned(self, call: Call, batch_dims: int) -> dict[tuple[str, ...], Tensor]:
        """The results of the method, whose shapes are kept for calls in which it is left out."""
        found = dict(self._method.compute(call))
        self._forms = {key: (value.shape[batch_dims:], value.dtype) for key, value in found.items()}
        return found

    def _blank(self, batch: torch.Size, device: torch.device | None) -> dict[tuple[str, ...], Tensor]:
        return {
            key: torch.full((*batch, *shape), missing_value(dtype), dtype=dtype, device=device)
            for key, (shape, dtype) in self._forms.items()
        }

    def _select(self, data: TensorDictBase, kind: str) -> Tensor:
        count = self._counts[kind]
        self._counts[kind] += 1
        rows = torch.full(data.batch_size, count % self._every == 0, device=data.device)
        if self._where is not None:
            rows = rows & self._marked(data)
        if self._fraction < 1 and bool(rows.any()):
            places = rows.reshape(-1).nonzero().squeeze(-1)
            generator = torch.Generator().manual_seed(stream_of(self._seed, "rows", count))
            kept = max(1, math.ceil(self._fraction * len(places) - 1e-9))
            drawn = places[torch.randperm(len(places), generator=generator)[:kept].to(places.device)]
            rows = torch.zeros_like(rows)
            rows.view(-1)[drawn] = True
        self._notice(bool(rows.any()))
        return rows

    def _marked(self, data: TensorDictBase) -> Tensor:
        marked = required(data, self._where, f"the schedule of {self._name} reads")
        if marked.dtype != torch.bool:
            raise InputError(f"the schedule's where={self._where!r} is {marked.dtype}; it must be boolean")
        if marked.shape == (*data.batch_size, 1):
            marked = marked.squeeze(-1)
        if marked.shape != data.batch_size:
            raise InputError(
                f"the schedule's where={self._where!r} has shape {tuple(marked.shape)}; it must be one value for each "
                f"row of the batch {tuple(data.batch_size)}"
            )
        return marked

    def _notice(self, fired: bool) -> None:
        self._silent = 0 if fired else self._silent + 1
        if self._silent == max(PATIENCE, 2 * self._every):
            warn(
                f"the schedule of {self._name} (every={self._every}, where={self._where!r}) has selected no row in "
                f"{self._silent} calls: nothing of it is computed"
            )
