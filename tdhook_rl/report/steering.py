"""A sweep as figures: what each vector does at each strength, beside its controls and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import dose_curve, value_grid
from tdhook_rl.statistics import Interval
from tdhook_rl.sweeps import SweepResult

#: What is marked: adjusted p-values up to this.
LEVEL = 0.05
RANDOM, SHUFFLED = "random", "shuffled"


def steering_curve(
    result: SweepResult,
    outcome: str,
    vector: str | None = None,
    *,
    competence: Sequence[str] = (),
    title: str = "",
    caption: str = "",
) -> Drawing:
    """An outcome by strength, with the bands of random directions and of shuffled labels, and the alpha of half of it.

    Of several training runs each is a thin line, and intervals are over runs.

    Args:
        result: of :func:`tdhook_rl.sweeps.steering_sweep`.
        outcome: its name.
        vector: its name, where there are several.
        competence: outcomes that should not suffer: in the same axes where all are shares, and else below.
        title: of the drawing.
        caption: what to see; how it was played, and what the bands are, is added.

    Raises:
        InputError: for a vector or an outcome that was not played.

    Example:
        >>> import torch
        >>> from tdhook_rl.sweeps import Condition
        >>> played = [Condition(), Condition(draw=1), Condition("up", 1.0), Condition("up", 1.0, "random", 0)]
        >>> won = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).double()
        >>> steering_curve(SweepResult(conditions=played, values={"won": won}), "won").alt.rpartition("; ")[2]
        '1 random directions: 0.25 to 0.25 at 1.'
    """
    alphas = result.alphas(vector)
    name = vector or result.vectors[0]
    several = runs_of(result)
    half = half_of(result, outcome, vector)
    how = "Same starts and same noise at every strength." if result.paired else "Strengths are not paired."
    return dose_curve(
        alphas,
        result.response(outcome, vector),
        random=result.control_response(outcome, vector, RANDOM),
        shuffled=result.control_response(outcome, vector, SHUFFLED),
        runs={
            f"run {run}": [float(result.of(outcome, vector, alpha)[result.runs == run].mean()) for alpha in alphas]
            for run in several
        },
        half=half if half is not None and half.known else None,
        competence={one: result.response(one, vector) for one in competence},
        outcome=outcome,
        title=title or f"{outcome} by strength of {name}",
        of="training runs" if several else "episodes",
        caption=f"{caption} {how}".strip(),
    )


def sweep_grid(result: SweepResult, outcome: str, *, level: float = LEVEL) -> Drawing:
    """A heatmap of the change of an outcome, vectors (sites) by strengths.

    Marked is what does something, and more than random directions of equal norm, p-values adjusted over the grid.

    Args:
        result: of :func:`tdhook_rl.sweeps.steering_sweep`.
        outcome: its name.
        level: of the marks.

    Raises:
        InputError: for an outcome that was not measured.

    Example:
        >>> import torch
        >>> from tdhook_rl.sweeps import Condition
        >>> played = [Condition(), Condition(draw=1), Condition("up", 1.0), Condition("down", 1.0)]
        >>> won = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).double()
        >>> sweep_grid(SweepResult(conditions=played, values={"won": won}), "won").data["cells"]
        [[0.75], [-0.25]]
    """
    rows = result.table(outcome)
    cells: dict[str, dict[str, Any]] = {}
    for one in sorted(rows, key=lambda one: one.alpha):
        cells.setdefault(one.vector, {})[f"{one.alpha:g}"] = one.effect
    marked = [(one.vector, f"{one.alpha:g}") for one in rows if one.adjusted <= level]
    return value_grid(
        {name: cells[name] for name in result.vectors}, unit=f"change of {outcome}, by alpha", marked=marked,
        title=f"What each vector does to {outcome}",
        caption="Against alpha 0. In bold or marked: it does something, and more than random directions of equal norm "
        f"(p adjusted over the grid at most {level:g}).",
    )  # fmt: skip


def strongest(result: SweepResult, vector: str) -> float:
    """The strength of a vector that is largest in size."""
    return max(result.alphas(vector), key=lambda alpha: (abs(alpha), alpha))


def ends(result: SweepResult, vector: str) -> list[float]:
    """The largest strengths of a vector to either side, as far as it was played there."""
    alphas = result.alphas(vector)
    return [alpha for alpha in (alphas[0], alphas[-1]) if alpha]


def half_of(result: SweepResult, outcome: str, vector: str | None) -> Interval | None:
    """The strength at which half of the effect is reached; ``None`` where none is above 0."""
    return result.alpha_50(outcome, vector) if max(result.alphas(vector)) > 0 else None


def runs_of(result: SweepResult) -> list[int]:
    """The training runs, where there are several."""
    found = [] if result.runs is None else result.runs.unique().tolist()
    return found if len(found) > 1 else []
