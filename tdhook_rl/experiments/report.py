"""The agents that experiments need, and the page that shows what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError
from tdhook_rl.experiments import EXPERIMENTS
from tdhook_rl.experiments.checkpoints import SEEDS, load, make
from tdhook_rl.experiments.findings import COLUMNS as COLUMNS
from tdhook_rl.experiments.findings import Experiment, Findings, Trained
from tdhook_rl.experiments.training import Progress
from tdhook_rl.report import Finding, Page, Section, save_findings
from tdhook_rl.report import Findings as Opening


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


def write(found: Mapping[str, Findings], seed: int, folder: Path, trained: bool = False) -> Path:
    """Write the figures, ``findings.json`` and ``report.html``; returns the path of the page.

    Args:
        found: findings by experiment.
        seed: of the agents.
        folder: where to.
        trained: whether the agents were trained for this, which the command that makes the page again has to do too.
    """
    answers = {name: _answers(name, findings) for name, findings in found.items()}
    save_findings(folder, [one for listed in answers.values() for one in listed])
    sections = []
    for name, findings in found.items():
        drawings = EXPERIMENTS[name].plot(findings)
        for number, drawing in enumerate(drawings):
            drawing.save(folder / "figures" / f"{name}{f'_{number}' if number else ''}.png")
        listed = [replace(one, question="") for one in answers[name]]  # it is the heading
        sections.append((EXPERIMENTS[name].title, listed, drawings))
    told = (
        f"{'Agents' if len(found) > 1 else 'An agent'} of seed {seed}, held against what the environment says is right."
    )
    name = next(iter(found)) if len(found) == 1 else "all"
    command = f"tdhook-rl experiment {name} --seed {seed}" + (" --train" if trained else "")
    if len(found) == 1:
        title, listed, drawings = sections[0]
        page = Page(title=title, lead=told, parts=[Opening(listed), *drawings], command=command)
    else:
        parts: list[Any] = [Opening([_summed(name, findings) for name, findings in found.items()])]
        parts += [Section(title, [Opening(listed, heading=""), *drawings]) for title, listed, drawings in sections]
        page = Page(title="Experiments whose answers are known", lead=told, parts=parts, command=command)
    return page.save(folder / "report.html")


def _answers(name: str, findings: Findings) -> list[Finding]:
    return [
        Finding(
            question=EXPERIMENTS[name].title,
            measured=check.measured,
            value=check.value,
            beside={"expected": check.expected},
            words=check.beside,
            met=check.met,
        )
        for check in findings.checks
    ]


def _summed(name: str, findings: Findings) -> Finding:
    met = sum(check.met for check in findings.checks)
    value = f"{met} of {len(findings.checks)}"
    return Finding(
        question=name, measured=EXPERIMENTS[name].title, value=value, words="figures as expected", met=findings.met
    )
