"""What single components do, as estimated and as measured, with intervals by group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cells import Cells, shown, words_of
from tdhook_rl.sweeps.causal.agreement import Agreement, agreement_of
from tdhook_rl.sweeps.causal.components import Components
from tdhook_rl.sweeps.causal.gap import Gap, pooled_shares


@dataclass(frozen=True, kw_only=True)
class UnitCell:
    """One component.

    Args:
        site: the path of the module.
        unit: its number there: of the unit, the channel, or the part.
        estimated: the share by attribution patching; ``None`` where there is none.
        measured: the share by patching it; ``None`` where that was not done.
    """

    site: str
    unit: int
    estimated: Interval | None = None
    measured: Interval | None = None

    @property
    def share(self) -> float:
        """The measured share, or else the estimated one."""
        found = self.measured or self.estimated
        return math.nan if found is None else found.estimate

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words; intervals with their limits."""
        found: dict[str, Any] = {"site": self.site, "unit": self.unit}
        for name in ("estimated", "measured"):
            one: Interval | None = getattr(self, name)
            values = (math.nan,) * 3 if one is None else (one.estimate, one.low, one.high)
            found |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        return found | {"words": words_of(self)}


class UnitTable(Cells[UnitCell]):
    """Components, one in each row, from the largest share on.

    Shares are pooled over states: all of the change of the metric, towards the other run, over all of the difference
    between the two.

    Args:
        components: which there are.
        gap: between the two runs.
        estimates: ``(components, states)``, changes of the metric; ``None`` without.
        changes: ``(components, states)``, as measured; NaN where it was not.
        groups: of the states.
        way, metric: as of :class:`PatchTable`.
        words: what one has to know.

    Attributes:
        components, gap, changes, way, metric, words: as given.
    """

    def __init__(
        self,
        components: Components,
        gap: Gap,
        estimates: Tensor | None,
        changes: Tensor | None,
        groups: Tensor | None,
        *,
        way: str,
        metric: str,
        words: str = "",
    ) -> None:
        self.components, self.gap, self.way, self.metric = components, gap, way, metric
        self.changes = changes
        self._estimates, self._groups = estimates, groups
        self.words = "; ".join(one for one in (words, gap.left_out(gap.source)) if one)

    @cached_property
    def estimates(self) -> Tensor | None:
        """``(components, states)``: changes of the metric to first order; ``None`` where nothing was estimated."""
        return None if self._estimates is None else self._estimates.double().cpu()

    @cached_property
    def _of(self) -> dict[tuple[str, int], UnitCell]:
        # Made when they are looked at: of many units in many states intervals cost more than the passes.
        sides = [
            None if one is None else pooled_shares(one, self.gap, self._groups)
            for one in (self.estimates, self.changes)
        ]
        found = {}
        for place, (site, unit) in enumerate(self.components.names):
            own = [None if side is None else side[place] for side in sides]
            found[site, unit] = UnitCell(site=site, unit=unit, estimated=own[0], measured=own[1])
        return found

    @cached_property
    def _cells(self) -> list[UnitCell]:  # type: ignore[override]
        return sorted(self._of.values(), key=lambda cell: -abs(cell.share) if cell.share == cell.share else 1.0)

    @cached_property
    def agreement(self) -> Agreement | None:
        """How far estimates are from what was measured, where there are both."""
        if self.estimates is None or self.changes is None:
            return None
        return agreement_of(self.estimates, self.changes, self.gap, self._groups)

    def __getitem__(self, key: Any) -> Any:
        """The cell of ``(site, unit)``; or cells by number, from the largest on.

        Raises:
            InputError: for a component that there is not.
        """
        key = plain_number(key)
        return super().__getitem__(key) if isinstance(key, (int, slice)) else self.components.cell(self._of, key)

    def grid(self, site: str, measured: bool = False) -> Tensor:
        """The shares of all components of a site, ``(components,)``.

        Args:
            site: its path.
            measured: as measured, NaN where that was not done; else the measured or the estimated share.
        """
        cells = [self[site, unit] for unit in range(self.components.parts.get(site, 0))]
        if not cells:
            self[site, 0]  # raises
        return torch.tensor(
            [(cell.measured.estimate if cell.measured else math.nan) if measured else cell.share for cell in cells]
        )

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown: the 20 largest."""
        both = [name for name in ("estimated", "measured") if any(getattr(cell, name) for cell in self)]
        heads = ["site", "unit", *(f"{name} share" for name in both)]
        return heads, [
            [cell.site, str(cell.unit), *(shown(getattr(cell, name)) for name in both)] for cell in self[:20]
        ]

    def __str__(self) -> str:
        said = [f"{self.way}, one component at a time; share of: {self.metric}"]
        said += [str(self.agreement)] if self.agreement is not None else []
        said += [self.words] if self.words else []
        more = [f"and {len(self) - 20} more"] if len(self) > 20 else []
        return "\n".join([*said, super().__str__(), *more])
