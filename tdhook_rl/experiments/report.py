"""The agents that experiments need, and the page that shows what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tdhook_rl.errors import InputError
from tdhook_rl.experiments import EXPERIMENTS
from tdhook_rl.experiments.checkpoints import SEEDS, load, make
from tdhook_rl.experiments.findings import COLUMNS, Experiment, Findings, Trained
from tdhook_rl.experiments.training import Progress
from tdhook_rl.report import Table, write_report
from tdhook_rl.report.drawing import Drawing


def agents(
    chosen: Iterable[Experiment], seed: int, folder: Path | None = None, progress: Progress = lambda *_: None
) -> dict[str, Trained]:
    """The agents of some experiments, each once.

    Args:
        chosen: the experiments.
        seed: of the agents.
        folder: where agents that are trained now are saved; without one, those of the package are loaded.
        progress: called while an agent is trained.

    Raises:
        InputError: for a seed that does not come with the package, if nothing is to be trained.
    """
    require_seed(seed, folder is not None)
    names = dict.fromkeys(experiment.agent for experiment in chosen)
    return {name: load(name, seed) if folder is None else make(name, seed, folder, progress) for name in names}


def require_seed(seed: int, trains: bool) -> None:
    """Raise an ``InputError`` for a seed that does not come with the package, if nothing is to be trained."""
    if not trains and seed not in SEEDS:
        raise InputError(f"agents of seeds {SEEDS[0]} to {SEEDS[-1]} come trained, seed {seed} does not: add --train")


def write(found: Mapping[str, Findings], seed: int, folder: Path) -> Path:
    """Write the figures and ``report.html``; returns the path of the page."""
    parts: list[Table | Drawing] = []
    for name, findings in found.items():
        experiment = EXPERIMENTS[name]
        parts.append(Table(experiment.title, COLUMNS, [check.row for check in findings.checks]))
        for number, drawing in enumerate(experiment.plot(findings)):
            drawing.save(folder / "figures" / f"{name}{f'_{number}' if number else ''}.png")
            parts.append(drawing)
    return write_report(
        folder / "report.html",
        "Experiments whose answers are known",
        f"Agents of seed {seed}, held against what their environments say is right.",
        parts,
    )
