"""The six experiments on the agents of all seeds, written as tables to docs/experiments.md.

python -m benchmarks.experiments            # under two minutes; the agents come with the package
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from tdhook_rl.experiments import EXPERIMENTS, SEEDS, Findings, load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "experiments.md"
HEADER = """# Experiments whose answers are known

Written by `python -m benchmarks.experiments`, with torch {torch}, tensordict {tensordict} and torchrl {torchrl}. Each
agent was trained by PPO (`python -m benchmarks.experiment_agents`) and comes with the package;
`tdhook-rl experiment NAME --seed S --train` trains one anew. What a figure is compared with is that of seed 0.
"""


def tables() -> tuple[str, bool]:
    """The page, and whether every figure is as expected."""
    parts, met = [HEADER.format(**{name: version(name) for name in ("torch", "tensordict", "torchrl")})], True
    for name, experiment in EXPERIMENTS.items():
        found = [experiment.measure(load(experiment.agent, seed)) for seed in SEEDS]
        met &= all(one.met for one in found)
        parts.append(f"## {experiment.title}\n\n`tdhook-rl experiment {name}`\n\n{_table(found)}")
        print(name, ["met" if one.met else "NOT MET" for one in found], flush=True)
    return "\n".join(parts), met


def _table(found: list[Findings]) -> str:
    lines = [["measured", *(f"seed {seed}" for seed in SEEDS), "expected", "beside it"]]
    lines.append(["---"] * len(lines[0]))
    for checks in zip(*(one.checks for one in found), strict=True):
        rows = [check.row for check in checks]
        values = [row[1] if check.met else f"**{row[1]}**" for row, check in zip(rows, checks, strict=True)]
        lines.append([rows[0][0], *values, rows[0][2], rows[0][3]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    page, met = tables()
    PAGE.write_text(page)
    raise SystemExit(0 if met else 1)
