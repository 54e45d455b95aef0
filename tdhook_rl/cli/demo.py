"""``tdhook-rl demo``: train a small agent and look inside it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdhook_rl.cli.showing import print_table, progress_bar, seed, terminal

if TYPE_CHECKING:
    from tdhook_rl.examples.demo import Settings

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    demo = commands.add_parser(
        "demo",
        help="train a small agent and look inside it",
        description="Train PPO on CueCorners with the hooked policy in the collector, then probe and steer it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--frames", type=int, default=81_920, help="environment frames to train on")
    demo.add_argument("--seed", type=seed, default=0, help="of the network, the environment and the evaluation")
    demo.add_argument("--workers", type=int, default=0, help="collector processes; 0 collects in this one")
    demo.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/demo-TIME)")
    demo.add_argument("--logger", choices=("wandb", "csv"), default="wandb", help="wandb runs offline, beside the CSV")
    demo.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torch
    import torchrl

    from tdhook_rl.examples import demo
    from tdhook_rl.files.durable import tidied
    from tdhook_rl.report import new_folder

    torchrl.logger.setLevel("ERROR")  # its INFO lines would cut through the progress bar
    # Nets this small gain nothing from a second thread, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    settings = demo.Settings(frames=options.frames, seed=options.seed, workers=options.workers, logger=options.logger)
    place = options.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with tidied(place):
        return _shown(settings, new_folder(place))


def _shown(settings: Settings, folder: Path) -> int:
    from tdhook_rl.examples import demo, demo_report
    from tdhook_rl.report import open_wandb
    from tdhook_rl.rollout import Interruptible

    console = terminal()
    logger = open_wandb(folder, folder.name, vars(settings)) if settings.logger == "wandb" else None
    bar = progress_bar(console)
    interruptible = Interruptible()

    def show(what: str, done: int, total: int) -> None:
        interruptible.check()
        bar.update(task, description=what, completed=done, total=total)

    try:
        with interruptible, bar:
            task = bar.add_task("starting", total=settings.frames)
            found = demo.run(settings, folder, logger, show)
        report = demo_report.write(found, settings, folder)
    except (KeyboardInterrupt, Exception) as error:
        # A worker that was stopped while it started ends in an error of the collector's.
        if not (interruptible.requested or isinstance(error, KeyboardInterrupt)):
            raise
        console.print(
            f"stopped; what was measured so far is in {folder / 'log.csv'}, and `tdhook-rl report {folder}` shows it",
            soft_wrap=True,
        )
        return 130
    finally:
        if logger is not None:
            logger.close()
    _print_summary(console, demo_report, found, folder, report)
    return 0


def _print_summary(console: Any, demo_report: Any, found: Any, folder: Path, report: Path) -> None:
    title = f"What was found in {found.seconds:.0f} s"
    print_table(console, title, demo_report.COLUMNS, demo_report.summary(found))
    for name, what in (
        (report.name, "the report: open it in a browser"),
        ("log.csv", "every measurement, as step, name, value"),
        ("wandb", "the W&B run; `wandb sync` uploads it"),
        ("histograms.jsonl", "activations and attributions over training"),
        ("overview.png", "the three questions in one figure"),
        ("probe_xor.safetensors", "the fitted probe (with .json)"),
        ("vector_corner_a.safetensors", "the steering vector (with .json)"),
        ("actor.safetensors", "the trained weights"),
    ):
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True)
