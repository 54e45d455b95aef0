"""The command line: ``tdhook-rl demo`` and ``tdhook-rl check``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError, TdhookError, nearest

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (1 for an error that has a message, 130 for Ctrl-C)."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except TdhookError as error:
        print(f"tdhook-rl: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib"):
            raise
        print(f"tdhook-rl: the demo needs {error.name}: pip install 'tdhook_rl[demo]'", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdhook-rl", description="Interpretability for TorchRL policies.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small agent and look inside it",
        description="Train PPO on CueCorners with the hooked policy in the collector, then probe and steer it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--frames", type=int, default=81_920, help="environment frames to train on")
    demo.add_argument("--seed", type=int, default=0, help="of the network, the environment and the evaluation")
    demo.add_argument("--workers", type=int, default=0, help="collector processes; 0 collects in this one")
    demo.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/demo-TIME)")
    demo.add_argument("--logger", choices=("wandb", "csv"), default="wandb", help="wandb runs offline, beside the CSV")
    demo.set_defaults(command=_demo)
    check = commands.add_parser(
        "check",
        help="try a hooked policy in its environment and collector, and say what would fail",
        description="A dry run on copies: keys, shapes, pickling, devices, buffers, graphs. Exit status 1 on errors.",
    )
    check.add_argument(
        "source",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="returns (hooked_policy, env) or (hooked_policy, env, collector_kwargs); a built-in example by default",
    )
    check.add_argument("--compile", action="store_true", help="look for graph breaks and recompilations as well")
    check.add_argument("--workers", type=int, default=0, help="also try so many spawned workers")
    check.set_defaults(command=_check)
    return parser


def _check(options: argparse.Namespace) -> int:
    from tdhook_rl.rollout import check

    parts = _example() if options.source is None else _load(options.source)()
    if not isinstance(parts, tuple) or len(parts) not in (2, 3):
        raise InputError(f"{options.source} returned {parts!r}: it must return (policy, env) or (policy, env, kwargs)")
    policy, env, *rest = parts
    arguments = {**(rest[0] if rest else {}), **({"num_workers": options.workers} if options.workers else {})}
    report = check(policy, env, arguments, compile=options.compile)
    try:
        from rich.console import Console

        Console().print(report)
    except ModuleNotFoundError:
        print(report)
    return 0 if report.ok else 1


def _load(source: str) -> Callable[[], Any]:
    module, _, name = source.partition(":")
    if not module or not name:
        raise InputError(f"{source!r} names no function: write MODULE:FUNCTION, such as my_project.train:make")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(f"no module is named {error.name!r}, which {source!r} needs") from error
    except AttributeError as error:
        known = vars(importlib.import_module(module))
        raise InputError(f"{module!r} has no {name!r}; {nearest(name, known)}") from error


def _example() -> tuple[Any, ...]:
    from tdhook_rl import ActivationCaching, Compose, Saliency
    from tdhook_rl.envs import CueCorners
    from tdhook_rl.examples.agent import FC2, make_actor

    method = Compose(ActivationCaching(FC2), Saliency(when="step"))
    return method.prepare(make_actor(), return_context=False), CueCorners(batch_size=[4], seed=0)


def _demo(options: argparse.Namespace) -> int:
    import torchrl
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from tdhook_rl.examples import demo, demo_report
    from tdhook_rl.report import new_folder, open_sinks
    from tdhook_rl.rollout import Interruptible

    torchrl.logger.setLevel("ERROR")  # its INFO lines would cut through the progress bar
    console = Console()
    settings = demo.Settings(frames=options.frames, seed=options.seed, workers=options.workers, logger=options.logger)
    folder = new_folder(options.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    sinks = open_sinks(folder, settings.logger, folder.name, vars(settings))
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} frames"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip
    interruptible = Interruptible()

    def show(what: str, done: int, total: int) -> None:
        interruptible.check()
        bar.update(task, description=what, completed=done, total=total)

    try:
        with interruptible, bar:
            task = bar.add_task("starting", total=settings.frames)
            found = demo.run(settings, folder, sinks, show)
        report = demo_report.write(found, settings, folder)
    except (KeyboardInterrupt, Exception) as error:
        # A worker that was stopped while it started ends in an error of the collector's.
        if not (interruptible.requested or isinstance(error, KeyboardInterrupt)):
            raise
        console.print(f"stopped; what was measured so far is in {folder / 'log.csv'}", soft_wrap=True)
        return 130
    finally:
        sinks.close()
    _print_summary(console, demo_report, found, folder, report)
    return 0


def _print_summary(console: Any, demo_report: Any, found: Any, folder: Path, report: Path) -> None:
    from rich.table import Table

    table = Table(title=f"What was found in {found.seconds:.0f} s")
    for column in demo_report.COLUMNS:
        table.add_column(column)
    for row in demo_report.summary(found):
        table.add_row(*row)
    console.print(table)
    for name, what in (
        (report.name, "the report: open it in a browser"),
        ("log.csv", "every measurement, as step, name, value"),
        ("wandb", "the W&B run; `wandb sync` uploads it"),
        ("figures", "the figures as PNG"),
        ("probe_xor.safetensors", "the fitted probe (with .json)"),
        ("vector_corner_a.safetensors", "the steering vector (with .json)"),
        ("actor.safetensors", "the trained weights"),
    ):
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
