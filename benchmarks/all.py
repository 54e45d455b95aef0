"""Every figure side by side with its peers, in one environment: ``make bench``.

python -m benchmarks.all
python -m benchmarks.all --only calls probes
python -m benchmarks.all --quick

A whole run writes ``docs/benchmarks.md`` and ``docs/benchmarks.json``; one of some groups, or a quick one, prints. A
group that fails is said, and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torchrl

from benchmarks import (
    actor_speed,
    analyze_cost,
    attribution_speed,
    causal_cost,
    collector_cost,
    compiled_speed,
    env_speed,
    growth,
    ig_memory,
    monitor_cost,
    prepared_call,
    probe_cost,
    relevance_speed,
    report_cost,
    sweep_cost,
)
from benchmarks.budgeted import Figure, header
from benchmarks.growth import Growth
from benchmarks.table import Measured, faster, missed, write

__all__ = ["GROUPS", "Group", "main", "run"]

DOCS = Path(__file__).parents[1] / "docs"
QUICK = 2


@dataclass(frozen=True)
class Group:
    """Figures that are measured together.

    Attributes:
        about: what they show, in a line.
        module: that measures them, whose own command has more options.
        figures: from how many rounds to the figures.
        rounds: of a whole run.
        seconds: that these take on two quiet cores, for the time that is left.
    """

    about: str
    module: str
    figures: Callable[[int], Iterator[Figure | Growth]]
    rounds: int
    seconds: float


#: Sizes and rounds are chosen so that all take less than 20 minutes on two quiet cores.
GROUPS: dict[str, Group] = {
    "calls": Group("One call of a hooked policy", "prepared_call", prepared_call.figures, 30, 20),
    "collectors": Group(
        "Methods in a collector",
        "collector_cost",
        lambda rounds: chain(
            collector_cost.figures(rounds, nets=("mlp",), workers=(), within=5.0),
            collector_cost.figures(rounds, nets=("conv",), envs=(8,), workers=(), within=5.0),
        ),
        15,
        90,
    ),
    "attribution": Group(
        "Attributions of a network's output",
        "attribution_speed",
        # Integrated gradients of the convolutional network are among the actors.
        lambda rounds: attribution_speed.figures(rounds, attribution_speed.ROWS[:-1], seconds=10.0),
        11,
        100,
    ),
    "actors": Group("Attributions of actors", "actor_speed", actor_speed.figures, 7, 300),
    "compiled": Group("Attributions that are compiled", "compiled_speed", compiled_speed.figures, 9, 90),
    "relevance": Group(
        "Layer-wise relevance propagation",
        "relevance_speed",
        lambda rounds: relevance_speed.figures(rounds, within=8.0),
        15,
        30,
    ),
    "memory": Group(
        "Peak memory of integrated gradients",
        "ig_memory",
        lambda rounds: ig_memory.figures(min(rounds, 3), steps=(50, 200), batches=()),
        3,
        80,
    ),
    "probes": Group(
        "Probes",
        "probe_cost",
        lambda rounds: probe_cost.figures(rounds, frames=40_960, every=(5,)),
        4,
        90,
    ),
    "buffers": Group("Stored data", "analyze_cost", lambda rounds: analyze_cost.figures(rounds, rows=100_000), 7, 25),
    "monitor": Group(
        "Logging while training",
        "monitor_cost",
        lambda rounds: monitor_cost.figures(rounds, frames=40_960, ways=(monitor_cost.NUMBERS, monitor_cost.MEDIA)),
        4,
        45,
    ),
    "reports": Group("Reports", "report_cost", lambda rounds: report_cost.figures(rounds, runs=(1,)), 3, 50),
    "sweeps": Group("Steering and sweeps", "sweep_cost", sweep_cost.figures, 3, 85),
    "causal": Group("Causal tests", "causal_cost", lambda rounds: causal_cost.figures(rounds, within=10.0), 15, 20),
    "environments": Group(
        "Environments", "env_speed", lambda rounds: env_speed.figures(rounds, batches=(1, 128)), 5, 10
    ),
    "growth": Group("How cost grows", "growth", lambda rounds: growth.figures(rounds, within=6.0), 10, 60),
}


def run(groups: Sequence[str], quick: bool = False) -> Iterator[Measured]:
    """Measure group by group; each is printed as it goes.

    Args:
        groups: their names.
        quick: two rounds of each, to see that it runs.
    """
    left, pace, began = sum(GROUPS[name].seconds for name in groups), 1.0, time.perf_counter()
    done = 0.0
    for place, name in enumerate(groups):
        group = GROUPS[name]
        minutes = pace * (left - done) / 60
        remaining = "" if quick else f", about {minutes:.0f} minutes left" if minutes > 1.5 else ", a minute left"
        print(f"\n{name} ({place + 1} of {len(groups)}{remaining}): {group.about}", flush=True)
        yield _measured(name, group, QUICK if quick else group.rounds)
        done += group.seconds
        pace = (time.perf_counter() - began) / done


def _measured(name: str, group: Group, rounds: int) -> Measured:
    found = Measured(name, group.about, f"python -m benchmarks.{group.module}")
    wall, before = time.perf_counter(), _processor()
    try:
        if name != "growth":
            print(header())
        for figure in group.figures(rounds):
            print(f"{time.perf_counter() - wall:5.0f} s  {figure}", flush=True)
            (found.growth if isinstance(figure, Growth) else found.figures).append(figure)
    except Exception as error:  # what it gave before stays, and the others go on
        found.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{name} FAILED: {found.failed}", flush=True)
    found.seconds = time.perf_counter() - wall, _processor() - before
    return found


def _processor() -> float:
    """Seconds of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a group failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds of each, to see that it runs")
    parser.add_argument("--out", type=Path, help="the folder to write page and JSON to; docs after a whole run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(run(options.only or list(GROUPS), options.quick))
    folder = options.out or (None if options.only or options.quick else DOCS)
    if folder is not None:
        write(found, folder)
        print(f"\nwritten: {folder.name}/benchmarks.md and benchmarks.json")
    for title, figures in (("budgets missed", missed(found)), ("others are faster", faster(found))):
        print(f"\n{title}: {len(figures)}")
        for figure in figures:
            print(f"  {figure}")
    failed = [group for group in found if group.failed]
    for group in failed:
        print(f"\n{group.name} failed: {group.failed}", file=sys.stderr)
    wall, processor = (sum(group.seconds[place] for group in found) for place in (0, 1))
    print(f"\n{wall / 60:.1f} minutes, {processor / 60:.1f} of the processor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
