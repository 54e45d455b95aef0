"""``tdhook-rl experiment``: repeat an experiment on an agent whose environment says what is right."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdhook_rl.cli.showing import print_table, progress_bar, seed, terminal

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    experiment = commands.add_parser(
        "experiment",
        help="repeat an experiment on an agent whose environment says what is right",
        description="Measure an agent that comes with the package, or one that is trained anew, and hold the figures "
        "against what is expected; exits 1 if one is not met.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    experiment.add_argument(
        "name",
        metavar="NAME",
        help="known_value, steering, probing, memory, patching, misgeneralisation, or all of them",
    )
    experiment.add_argument("--seed", type=seed, default=0, help="of the agent; 0 to 2 come trained")
    experiment.add_argument("--train", action="store_true", help="train the agent first, which takes up to two minutes")
    experiment.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/NAME-TIME)")
    experiment.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  (without it the figures would fail after the work)
    import torch
    import torchrl

    from tdhook_rl.experiments import EXPERIMENTS, experiment, report
    from tdhook_rl.files.durable import tidied
    from tdhook_rl.report import new_folder

    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    names = list(EXPERIMENTS) if options.name == "all" else [options.name]
    chosen = {name: experiment(name) for name in names}
    report.require_seed(options.seed, options.train)  # mistakes end before there is a folder
    place = options.out or Path("runs") / time.strftime(f"{options.name}-%Y%m%d-%H%M%S")
    with tidied(place):
        return _measured(chosen, new_folder(place), options)


def _measured(chosen: Mapping[str, Any], folder: Path, options: argparse.Namespace) -> int:
    from tdhook_rl.errors import TdhookError
    from tdhook_rl.experiments import report
    from tdhook_rl.rollout import Interruptible

    console = terminal()
    bar = progress_bar(console)
    interruptible = Interruptible()
    found: dict[str, Any] = {}
    stopped: BaseException | None = None
    try:
        with interruptible, bar:
            task = bar.add_task("starting", total=None)

            def show(what: str, done: int = 0, total: int | None = None) -> None:
                interruptible.check()
                bar.update(task, description=what, completed=done, total=total)

            agents = report.agents(chosen.values(), options.seed, folder if options.train else None, show)
            for name, one in chosen.items():
                show(f"measuring  {name}")
                found[name] = one.measure(agents[one.agent])
    except (KeyboardInterrupt, TdhookError) as error:
        stopped = error
    for name, findings in found.items():
        print_table(console, chosen[name].title, report.COLUMNS, [check.row for check in findings.checks])
    if found:
        page = report.write(found, options.seed, folder, options.train)
        console.print(f"  {page}  the report: open it in a browser", highlight=False, soft_wrap=True)
    if isinstance(stopped, KeyboardInterrupt):
        console.print(f"stopped after {len(found)} of {len(chosen)} experiments", soft_wrap=True)
        return 130
    if stopped is not None:
        raise stopped
    return 0 if all(findings.met for findings in found.values()) else 1
