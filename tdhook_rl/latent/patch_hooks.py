"""The hooks of activation patching: one keeps what a module gives in the first run, one puts it into the second."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.sites.containers import other_tensors, with_other_tensors
from tdhook_rl.sites.hooks import CaptureHook, Portable
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.paths import Site
from tdhook_rl.sites.repeats import Several, added, several_runs
from tdhook_rl.sites.row_values import ROWS_REMEDY, require_whole_rows, rows_under_way
from tdhook_rl.sites.rows import rows_of, with_rows, without_vmap
from tdhook_rl.sites.runtime import Runtime


class KeepHook(CaptureHook):
    """Forward hook that keeps every tensor that its module gives, in each run, while the root call records."""

    def __init__(self, runtime: Runtime, slot: str) -> None:
        super().__init__(runtime, slot, "all")

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        super().__call__(module, args, output)
        if not self.runtime.recording or isinstance(output, Tensor):
            return
        slots = self.runtime.slots
        kept = slots[self.slot]
        first = isinstance(kept, Several) and len(kept.values) == 1
        for number, tensor in enumerate(_others(output, module)):
            slot = f"{self.slot}+{number}"
            value = without_vmap(tensor, module, self.runtime)[0].detach().clone()
            slots[slot] = added(None if first else slots.get(slot), value, "all")  # type: ignore[arg-type]


class PatchHook:
    """Forward hook that puts the kept output in while its own method runs the policy again.

    Without a function this is all that the module gave, such as the last state of an LSTM beside its outputs; a
    function decides on the first tensor.
    """

    def __init__(
        self,
        runtime: Runtime,
        owner: str,
        slot: str,
        site: Site,
        function: Portable | None,
        keywords: bool,
        beside: bool,
    ) -> None:
        self.runtime = runtime
        self.owner = owner
        self.slot = slot
        self.site = site.name
        self.run = site.run
        self.function = function
        self.acts_on_states = function is None
        self.keywords = keywords
        self.beside = beside  # the function takes the rows, too

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        if runtime.explaining != self.owner:
            return None
        index = runtime.run_of(self.slot)
        if self.slot not in runtime.slots:
            raise SiteError(f"the module {self.site!r} runs on the patched inputs but did not run on the data's own")
        number = self._number(index)
        if number is None:
            return None
        original = self._kept(self.slot, number)
        value, disguise = rows_of(output, module, self.site, runtime)
        require_whole_rows(value, runtime, self.site)
        patch = None
        beside = {"rows": rows_under_way(runtime, self.site, "patch_fn")} if self.beside else {}
        if self.function is not None:
            lent = value.clone()  # where a module hands on what it was given, that is the caller's
            given = () if self.keywords else (self.site, lent, original)
            named = {"module_key": self.site, "output": lent, "output_to_patch": original} if self.keywords else {}
            sees, what = list(beside.values()), f"patch_fn at {self.site!r}"
            patch = asked(self.function, *given, what=what, sees=sees, remedy=ROWS_REMEDY, **named, **beside)
        if patch is None:
            patch = original
        self._require_shape(patch, value)
        patch = in_dtype(patch, value, "the patch", self.site)
        patched = with_rows(output, patch, module, disguise)
        return patched if self.function is not None else self._all_patched(patched, module, number)

    def _number(self, index: int) -> int | None:
        """Which of the kept runs belongs to the run under way; ``None`` where another run is meant."""
        if isinstance(self.run, int) and self.run >= 0:
            return 0  # the only one that was kept
        times = len(self.runtime.slots[self.slot].values)  # type: ignore[union-attr]
        if self.run is None and index:
            raise several_runs(self.site)
        if index >= times:
            raise other_count(self.site, times, "more")
        if isinstance(self.run, int) and index != times + self.run:
            return None
        return index

    def _kept(self, slot: str, number: int) -> Tensor | None:
        kept = self.runtime.slots.get(slot)
        return kept.values[number] if isinstance(kept, Several) and number < len(kept.values) else None

    def _all_patched(self, output: Any, module: nn.Module, number: int) -> Any:
        if isinstance(output, Tensor):
            return output
        values = []
        for place, tensor in enumerate(_others(output, module)):
            value, back = without_vmap(tensor, module, self.runtime)
            patch = self._kept(f"{self.slot}+{place}", number)
            self._require_shape(patch, value)
            patch = in_dtype(patch, value, "the patch", self.site)  # type: ignore[arg-type]
            values.append(patch if back is None else back(patch))
        return with_other_tensors(output, values, module)

    def _require_shape(self, patch: Any, value: Tensor) -> None:
        if not isinstance(patch, Tensor) or patch.shape != value.shape:
            got = tuple(patch.shape) if isinstance(patch, Tensor) else type(patch).__name__
            raise InputError(f"the patch of {self.site!r} must have shape {tuple(value.shape)}, got {got}")


def runs_kept(call: Call, slot: str, site: Site) -> int | None:
    """How often a site ran on the data's own inputs, where it may be more than once.

    Raises:
        SiteError: if it did not run, or ran several times and does not say which run is meant.
    """
    kept = call.slots.get(slot)
    if not isinstance(kept, Several):
        call.captured(slot, site.name)  # raises
    times = len(kept.values)  # type: ignore[union-attr]
    if isinstance(site.run, int) and site.run >= 0:
        return None
    if site.run is None and times > 1:
        raise several_runs(site.name, times)
    if isinstance(site.run, int):
        Several(site.run, kept.values).points(site.name)  # type: ignore[union-attr]
    return times


def other_count(site: str, times: int, patched: int | str) -> SiteError:
    """The error for a module that does not run equally often in both runs."""
    return SiteError(
        f"the module of {site!r} ran {times} times on the data's own inputs and {patched} times on the patched ones, "
        "so that its runs do not correspond: name one that takes place in both, as in 'act@0'"
    )


def _others(output: Any, module: nn.Module) -> list[Tensor]:
    layout = module._hooked_layout
    # The state of the core of a recurrent module is carried to the next step; it is no output of this one.
    return [] if layout is not None and layout.recurrent else other_tensors(output, module)  # type: ignore[union-attr]
