"""A module that runs several times in one forward: which run a hook acts in, and what the runs give together.

The runs are counted anew in each call of the policy (``Runtime.run_of``), in a dictionary that belongs to the call:
a counter that outlived it would make ``torch.compile`` recompile in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.sites.paths import Run
from tdhook_rl.sites.rows import with_batch
from tdhook_rl.sites.runtime import Runtime


class Several(NamedTuple):
    """What each run of a module gave in one call, for a site of all runs or of one counted from the last.

    Args:
        run: which is meant; ``"steps"`` where each is of one step of the batch, whose last dimension is time.
        values: of all runs so far.
    """

    run: int | Literal["all", "steps"]
    values: tuple[Tensor, ...]

    def points(self, site: str) -> tuple[Tensor, ...]:
        """The values that are meant: all, or one.

        Raises:
            SiteError: if the module did not run so often.
        """
        if isinstance(self.run, str):
            return self.values
        if not -len(self.values) <= self.run < len(self.values):
            raise SiteError(f"{site!r} names a run that did not take place: the module ran {_times(len(self.values))}")
        return (self.values[self.run],)

    def chosen(self, batch: torch.Size, site: str) -> Tensor:
        """The value that is meant, batch first; those of all runs in a dimension after the batch."""
        points = self.points(site)
        if self.run == "steps":
            return _in_time(points, batch, site)
        return stacked(points, batch, site) if self.run == "all" else with_batch(points[0], batch, site)


def added(several: Several | None, value: Tensor, run: int | Literal["all", "steps"]) -> Several:
    """The values so far, and one more."""
    return Several(run, (value,) if several is None else (*several.values, value))


def stacked(values: tuple[Tensor, ...], batch: torch.Size, site: str) -> Tensor:
    """What the runs of a module gave, in one tensor with a dimension for the runs after the batch.

    Raises:
        SiteError: if the runs gave tensors of several shapes.
    """
    rows = [with_batch(value, batch, site) for value in values]
    if any(one.shape != rows[0].shape for one in rows):
        shapes = ", ".join(str(tuple(one.shape)) for one in rows[:4])
        raise SiteError(
            f"the runs of {site!r} gave tensors of several shapes ({shapes}), which cannot stand side by side: name "
            f"one, {_base(site)}@0' to {_base(site)}@{len(values) - 1}'"
        )
    return torch.stack(rows, len(batch))


def _in_time(values: tuple[Tensor, ...], batch: torch.Size, site: str) -> Tensor:
    if len(values) != batch[-1]:
        raise SiteError(
            f"the module {site!r} ran {_times(len(values))} in a batch of {batch[-1]} steps, which are handed to it "
            "one at a time, so it is not known which step each run belongs to"
        )
    return torch.stack([with_batch(value, batch[:-1], site) for value in values], len(batch) - 1)


def part_of(given: Tensor, index: int, run: Run, total: int | None, value: Tensor, batch: torch.Size | None) -> Any:
    """Of a value in the place of what a site computes, the part for one run; ``None`` where it is for another run.

    Args:
        given: the value; for all runs with a dimension for them after the batch.
        index: the run under way.
        run: which the site means.
        total: how often the module ran where the value is from.
        value: what the module computed in this run.
        batch: the batch size of the call.
    """
    if run is None:
        return given
    if total is None or index >= total:
        raise SiteError(f"the module runs more often in this pass than in the call that it is compared with ({total})")
    if run == "all":
        return given.select(len(batch or ()), index).reshape(value.shape)
    return given if index == total + run else None


def runs_of(slot: str) -> str:
    """Under which it is kept how often a module ran whose values have the shape of the batch."""
    return f"{slot}:runs"


def require_rows(value: Tensor, times: int | None, batch: torch.Size, site: str) -> None:
    """Refuse what may be the last step of a batch with as many features as there are steps.

    Raises:
        InputError: if the module ran once for each step, and gave tensors that have just the shape of the batch.
    """
    if times is None or value.shape != batch or times != batch[-1] or times == 1:
        return
    raise InputError(
        f"{site!r} ran {_times(times)} in a batch of shape {tuple(batch)}, and gave {tuple(value.shape)} each time: a "
        "number for each row, or the features of one step, and nothing says which. If these are rows, name the last "
        f"run, {_base(site)}@-1'; if they are steps, let time be no dimension of the batch (data.batch_size = "
        f"data.batch_size[:-1]) and name {_base(site)}@all', or call the policy with another number of steps"
    )


def several_runs(site: str, times: int | None = None) -> SiteError:
    """The error for a site that ran several times where one run is needed."""
    count = "more than once" if times is None else _times(times)
    last = "and so on" if times is None else f"to {_base(site)}@{times - 1}'"
    return SiteError(
        f"the module {site!r} ran {count} in one call, and which run is meant was not said: write {_base(site)}@0' "
        f"(the first) {last}, {_base(site)}@-1' (the last), or {_base(site)}@all' (each by itself)"
    )


class RunHook:
    """Hook or pre-hook that lets another one act in one run of its module only, from 0; runs are counted under ``key``.

    One that only ``observes`` may be left out where calls cannot be told apart.
    """

    def __init__(
        self, runtime: Runtime, key: str, site: str, run: int, hook: Callable[..., Any], observes: bool
    ) -> None:
        self.runtime = runtime
        self.key = key
        self.site = site
        self.run = run
        self.hook = hook
        self.observes = observes

    @property
    def user_code(self) -> Any:
        return getattr(self.hook, "user_code", None)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        runtime = self.runtime
        runtime.require_open()
        if runtime.runs is None:
            if self.observes:
                return None
            raise SiteError(
                f"{self.site!r} names a run of a module, which was called outside of a call of the hooked policy, so "
                "that its runs cannot be counted: call the policy, or leave the run out"
            )
        return self.hook(module, *given) if runtime.run_of(self.key) == self.run else None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _base(site: str) -> str:
    """The site without its run, quoted, for choices to be appended."""
    return repr(site.rpartition("@")[0] if "@" in site else site)[:-1]
