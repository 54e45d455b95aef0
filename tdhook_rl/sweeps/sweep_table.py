"""A vector at a strength: what it does, beside what random directions of its norm do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cells import Cells, shown, words_of


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One vector at one strength, and one outcome.

    Args:
        vector: its name.
        alpha: the strength.
        outcome: its name.
        mean: the outcome under it.
        baseline: the outcome at alpha 0.
        effect: the change, by episode where they are paired.
        random, shuffled: the change under each control of equal norm.
        specificity: the effect over the size of the largest of a control.
        p: that it does nothing, or no more than a random direction; see
            :meth:`~tdhook_rl.sweeps.SweepResult.p`.
        adjusted: the same, adjusted over all vectors and strengths of this outcome (Holm 1979).
    """

    vector: str
    alpha: float
    outcome: str
    mean: Interval
    baseline: Interval
    effect: Interval
    random: Tensor
    shuffled: Tensor
    specificity: Interval | None = None
    p: float = math.nan
    adjusted: float = math.nan

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words."""
        found: dict[str, Any] = {"vector": self.vector, "alpha": self.alpha, "outcome": self.outcome}
        for name in ("mean", "baseline", "effect"):
            found |= _three(name, getattr(self, name))
        for name in ("random", "shuffled"):
            one = getattr(self, name)
            if len(one):
                ends = {f"{name}_low": float(one.min()), f"{name}_high": float(one.max())}
                found |= {name: float(one.mean()), **ends, f"{name}_draws": len(one)}
        if self.specificity is not None:
            found |= _three("specificity", self.specificity)
        return found | {
            "p": self.p, "adjusted": self.adjusted, "groups": self.mean.groups, "episodes": int(self.mean.rows),
            "words": words_of(self),
        }  # fmt: skip


class SweepTable(Cells[SweepRow]):
    """Rows of a sweep, as text, HTML, JSON or a DataFrame."""

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown."""
        kinds = [kind for kind in ("random", "shuffled") if any(len(getattr(one, kind)) for one in self._cells)]
        heads = ["vector", "alpha", "outcome", "at alpha 0", "mean", "effect"]
        heads += [f"{kind} (most)" for kind in kinds] + ["specificity"] * bool(kinds) + ["adjusted p", "episodes"]
        rows = []
        for one in self._cells:
            row = [one.vector, f"{one.alpha:g}", one.outcome, f"{one.baseline:.3f}", shown(one.mean), shown(one.effect)]
            row += [_band(getattr(one, kind)) for kind in kinds] + [shown(one.specificity)] * bool(kinds)
            rows.append([*row, f"{one.adjusted:.2g}", f"{one.mean.rows:.0f}"])
        return heads, rows


def _most(effects: Tensor) -> float:
    return float(effects[effects.abs().argmax()])


def _band(effects: Tensor) -> str:
    return f"{float(effects.mean()):.3f} ({_most(effects):.3f})" if len(effects) else "-"


def _three(name: str, one: Interval) -> dict[str, float]:
    return {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
