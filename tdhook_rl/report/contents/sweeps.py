"""What steering was found to do in runs: each sweep, and those of several runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.page import Table
from tdhook_rl.report.runs import Run
from tdhook_rl.report.sweep_pages import chosen_outcomes, sweep_drawings, sweep_rows
from tdhook_rl.sweeps import SweepResult


def sweep_drawings_of(runs: Sequence[Run]) -> list[Drawing]:
    """Of several runs the curves over all of them; of one those that are not saved beside it."""
    together = together_of(runs)
    if together is not None:
        return sweep_drawings(together, *chosen_outcomes(together))
    alone = runs[0]
    if len(runs) > 1 or alone.sweep is None or alone.figures:
        return []
    return sweep_drawings(alone.sweep, *chosen_outcomes(alone.sweep))


def sweeps_of(runs: Sequence[Run]) -> list[Table]:
    """Every vector and strength: of each run, and of all of them where there are several."""
    found = [
        replace(table, heading=f"{table.heading} of {run.name}") if len(runs) > 1 else table
        for run in runs if run.sweep is not None for table in [sweep_rows(run.sweep)]
    ]  # fmt: skip
    together = together_of(runs)
    if together is None:
        return found
    count = sum(run.sweep is not None for run in runs)
    return [replace(sweep_rows(together), heading=f"Every vector and strength over {count} runs"), *found]


def together_of(runs: Sequence[Run]) -> SweepResult | None:
    """The sweeps of several runs as one, where they are of the same conditions."""
    sweeps = [run.sweep for run in runs if run.sweep is not None]
    if len(sweeps) < 2:
        return None
    try:
        return SweepResult.together(sweeps)
    except InputError:
        return None
