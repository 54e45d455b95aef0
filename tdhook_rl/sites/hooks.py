"""Picklable hook objects that live on the clone.

Hooks are small importable objects: no closures (workers unpickle them), no counters and no growing lists
(each would make ``torch.compile`` recompile in silence).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.sites.containers import first_input
from tdhook_rl.sites.inner_calls import require_whole_batch, step_of_batch
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.paths import Run
from tdhook_rl.sites.repeats import added, part_of, runs_of, several_runs
from tdhook_rl.sites.rows import as_leaf, rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime


class CaptureHook:
    """Forward hook that keeps the output of its module while the root call records.

    The output is detached and copied: an in-place activation after the module, or an environment that
    reuses its observation buffer, would otherwise overwrite what was captured.
    """

    def __init__(self, runtime: Runtime, slot: str, run: Run = None) -> None:
        self.runtime = runtime
        self.slot = slot
        self.run = None if run == -1 or (isinstance(run, int) and run >= 0) else run  # the last is what remains
        self.said = run is not None  # which run is meant

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        runtime = self.runtime
        runtime.require_open()
        if runtime.recording:
            self._store(rows_of(output, module, self.slot, runtime)[0])

    def _store(self, value: Tensor) -> None:
        runtime = self.runtime
        value = (value.detach() if value.requires_grad else value).clone()
        stepwise = (runtime.inner or runtime.steps) and step_of_batch(runtime, self.slot.partition(":")[2])
        if (run := "steps" if stepwise else self.run) is not None:
            before = runtime.slots.get(self.slot) if runtime.run_of(self.slot) else None
            value = added(before, value, run)  # type: ignore[arg-type, assignment]
        elif runtime.batch and value.shape == runtime.batch and not self.said:
            runtime.slots[runs_of(self.slot)] = runtime.run_of(self.slot) + 1
        runtime.slots[self.slot] = value


class InputCaptureHook(CaptureHook):
    """Forward pre-hook (with keywords) that keeps the first input of its module while the root call records."""

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.runtime.recording or not self.runtime.active:
            super().__call__(module, args, first_input(module, args, kwargs, self.slot))


class WatchHook:
    """Forward hook that keeps the output of its module, with its graph, for the targets of a replay.

    What follows is given a copy, which an in-place activation may overwrite.
    """

    def __init__(self, runtime: Runtime, slot: str, site: str, run: Run = None) -> None:
        self.runtime = runtime
        self.slot = slot
        self.site = site
        self.run = run

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        if runtime.replay is None:
            return None
        require_whole_batch(runtime, self.site)
        if self.run is None and runtime.run_of(self.slot):
            raise several_runs(self.site)
        value, disguise = rows_of(output, module, self.slot, runtime)
        runtime.replay.watched[self.slot] = value
        return with_rows(output, value.clone(), module, disguise)


class LeafHook:
    """Forward hook that makes the output of its module a leaf of the explanation pass.

    A leaf is the output itself where a gradient already reaches it, otherwise a detached copy that requires a
    gradient; or a given value in its place (or, in a functional pass, added to it as a difference of zero). What
    follows is given a copy: an in-place activation would overwrite the leaf, and be explained in its place.

    A site of all runs has a leaf in each of them; a value that is given for it has a dimension for the runs.
    """

    def __init__(self, runtime: Runtime, slot: str, site: str, run: Run = None, partial: bool = False) -> None:
        self.runtime = runtime
        self.slot = slot
        self.site = site
        self.run = None if isinstance(run, int) and run >= 0 else run
        self.partial = partial  # the rows of the site are found out

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        if self.slot not in runtime.leaves:
            return None
        require_whole_batch(runtime, self.site, self.partial)
        index = runtime.run_of(self.slot)
        if index and self.run is None:
            raise several_runs(self.site)
        value, disguise = rows_of(output, module, self.slot, runtime)
        if not (value.is_floating_point() or value.is_complex()):
            raise InputError(
                f"the output of {self.site!r} is of {value.dtype}, which has no gradient to explain it by: name a "
                "module that computes with floating-point numbers"
            )
        given = runtime.leaves[self.slot]
        if given is None:
            if not value.requires_grad and torch.is_grad_enabled():
                value = as_leaf(value)
            before = runtime.slots.get(self.slot) if index else None
            kept = value if self.run is None else added(before, value, self.run)  # type: ignore[arg-type]
        else:
            part = part_of(given, index, self.run, runtime.totals.get(self.slot), value, runtime.batch)
            if part is None:
                return None
            value = value + (part - part.detach()) if self.slot in runtime.added else part
            kept = given
        runtime.slots[self.slot] = kept
        return with_rows(output, value.clone(), module, disguise)


class Portable:
    """A user's callable that travels to spawned workers by cloudpickle, lambdas included."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Portable:
        return self

    def __reduce__(self) -> tuple:
        import cloudpickle

        return _load_portable, (cloudpickle.dumps(self.function),)


def _load_portable(data: bytes) -> Portable:
    import cloudpickle

    return Portable(cloudpickle.loads(data))


def portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it travels to workers: lambdas and local ones by cloudpickle, objects as they pickle themselves."""
    return Portable(function) if isinstance(function, types.FunctionType) else function


class ReadHook(CaptureHook):
    """Forward hook that keeps what a function reads from an output, a tensor with a row for each row."""

    def __init__(self, runtime: Runtime, slot: str, read: Callable[[Any], Tensor], run: Run = None) -> None:
        super().__init__(runtime, slot, run)
        self.read = portable(read)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self.runtime.recording or not self.runtime.active:
            super().__call__(module, args, self.read(output))


class ChangeHook:
    """Forward hook that puts in what a function makes of the rows that a site puts out."""

    def __init__(self, runtime: Runtime, site: str, change: Callable[[Tensor], Tensor]) -> None:
        self.runtime = runtime
        self.site = site
        self.change = portable(change)

    @property
    def user_code(self) -> Any:
        return getattr(self.change, "function", self.change)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        rows, disguise = rows_of(output, module, self.site, self.runtime)
        changed = self.change(rows)
        if not isinstance(changed, Tensor) or changed.shape != rows.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise InputError(
                f"what changes {self.site!r} is given rows of shape {tuple(rows.shape)} and returned {got}"
            )
        changed = in_dtype(changed, rows, "what a method puts in", self.site)
        return with_rows(output, changed, module, disguise)
