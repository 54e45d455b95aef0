"""The command line: ``tdhook-rl demo``, ``tdhook-rl experiment`` and ``tdhook-rl check``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _seed(text: str) -> int:
    """A seed that torch, NumPy and environments take."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"a seed is an integer from 0 to {2**32 - 1}, got {text!r}")
    return seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (1 for an error that has a message, 130 for Ctrl-C).

    As a program, Ctrl-C ends it in one line wherever it is: while packages are imported, workers start, or at its end.
    """
    stop = _Stop()
    try:
        with stop:
            return _run(arguments)
    except BaseException as error:
        # What is interrupted may end in an error of its own: an import, a library's loop.
        if not (stop.requested or isinstance(error, KeyboardInterrupt)) or isinstance(error, SystemExit):
            raise
        print("tdhook-rl: stopped", file=sys.stderr)
        if arguments is None:
            _leave()
        return 130


class _Stop:
    """Notes whether Ctrl-C was pressed, and otherwise leaves it as it is."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        raise KeyboardInterrupt


def _leave() -> None:
    """End the program here: what was half imported and half started would complain on the way out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children = sys.modules.get("multiprocessing")
    for child in children.active_children() if children is not None else ():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(130)


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no such letter shows a question mark
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    from tdhook_rl.errors import TdhookError

    try:
        return options.command(options)
    except TdhookError as error:
        print(f"tdhook-rl: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib"):
            raise
        print(f"tdhook-rl: this command needs {error.name}: pip install 'tdhook_rl[demo]'", file=sys.stderr)
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
    demo.add_argument("--seed", type=_seed, default=0, help="of the network, the environment and the evaluation")
    demo.add_argument("--workers", type=int, default=0, help="collector processes; 0 collects in this one")
    demo.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/demo-TIME)")
    demo.add_argument("--logger", choices=("wandb", "csv"), default="wandb", help="wandb runs offline, beside the CSV")
    demo.set_defaults(command=_demo)
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
    experiment.add_argument("--seed", type=_seed, default=0, help="of the agent; 0 to 2 come trained")
    experiment.add_argument("--train", action="store_true", help="train the agent first, which takes up to two minutes")
    experiment.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/NAME-TIME)")
    experiment.set_defaults(command=_experiment)
    check = commands.add_parser(
        "check",
        help="try a hooked policy in its environment and collector before training",
        description="Make a dry run on copies and list what would fail or go wrong in silence; exits 1 on an error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument(
        "target",
        nargs="?",
        default="tdhook_rl.examples.check:setup",
        metavar="MODULE:FUNCTION",
        help="returns (hooked policy, environment) or (..., collector arguments), and takes no argument",
    )
    check.add_argument("--compile", action="store_true", help="look for graph breaks and recompilations as well")
    check.add_argument("--workers", type=int, default=0, help="run a MultiSyncCollector with so many processes")
    check.add_argument("--steps", type=int, default=16, help="steps of the environment that are looked at one by one")
    check.add_argument("--time-limit", type=float, default=120.0, help="seconds, whatever it waits for")
    check.set_defaults(command=_check)
    sites = commands.add_parser(
        "sites",
        help="list the modules of a policy: paths, shapes, and how often each runs",
        description="Call a copy of the policy once and list what methods can name.",
    )
    sites.add_argument(
        "target",
        nargs="?",
        default="tdhook_rl.examples.check:setup",
        metavar="MODULE:FUNCTION",
        help="returns a policy, or (policy, environment or TensorDict), and takes no argument",
    )
    sites.set_defaults(command=_sites)
    return parser


def _demo(options: argparse.Namespace) -> int:
    import torch
    import torchrl
    from rich.console import Console

    from tdhook_rl.examples import demo, demo_report
    from tdhook_rl.report import new_folder, open_sinks
    from tdhook_rl.rollout import Interruptible

    torchrl.logger.setLevel("ERROR")  # its INFO lines would cut through the progress bar
    # Nets this small gain nothing from a second thread, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    console = Console()
    settings = demo.Settings(frames=options.frames, seed=options.seed, workers=options.workers, logger=options.logger)
    folder = new_folder(options.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    sinks = open_sinks(folder, settings.logger, folder.name, vars(settings))
    bar = _progress(console)
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


def _experiment(options: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  (without it the figures would fail after the work)
    import torch
    import torchrl
    from rich.console import Console

    from tdhook_rl.errors import TdhookError
    from tdhook_rl.experiments import EXPERIMENTS, experiment, report
    from tdhook_rl.report import new_folder
    from tdhook_rl.rollout import Interruptible

    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    console = Console()
    names = list(EXPERIMENTS) if options.name == "all" else [options.name]
    chosen = {name: experiment(name) for name in names}
    report.require_seed(options.seed, options.train)  # mistakes end before there is a folder
    folder = new_folder(options.out or Path("runs") / time.strftime(f"{options.name}-%Y%m%d-%H%M%S"))
    bar = _progress(console)
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
        _print_table(console, chosen[name].title, report.COLUMNS, [check.row for check in findings.checks])
    if found:
        page = report.write(found, options.seed, folder)
        console.print(f"  {page}  the report: open it in a browser", highlight=False, soft_wrap=True)
    if isinstance(stopped, KeyboardInterrupt):
        console.print(f"stopped after {len(found)} of {len(chosen)} experiments", soft_wrap=True)
        return 130
    if stopped is not None:
        raise stopped
    return 0 if all(findings.met for findings in found.values()) else 1


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} frames"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def _print_table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _check(options: argparse.Namespace) -> int:
    import torchrl

    from tdhook_rl.rollout import check

    torchrl.logger.setLevel("ERROR")
    policy, env, *rest = _called(options.target)
    arguments = dict(rest[0] if rest else {})
    if options.workers:
        arguments["num_workers"] = options.workers
    report = check(policy, env, arguments, steps=options.steps, compile=options.compile, time_limit=options.time_limit)
    _show(report)
    return 0 if report.ok else 1


def _sites(options: argparse.Namespace) -> int:
    import torchrl
    from tensordict import TensorDictBase

    from tdhook_rl import HookedModule
    from tdhook_rl.hooking.hooked import HookedMixin
    from tdhook_rl.method import HookingContext

    torchrl.logger.setLevel("ERROR")
    made = _returned(options.target)
    policy, given = (*made, None)[:2] if isinstance(made, tuple) else (made, None)
    if isinstance(policy, HookingContext):
        policy = policy.__enter__()
    elif not isinstance(policy, HookedMixin):
        policy = HookedModule.from_module(policy)
    if given is not None and not isinstance(given, TensorDictBase):
        given = (given() if not hasattr(given, "reset") else given).reset()
    print(policy.sites(given))
    return 0


def _show(report: Any) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console().print(report)
            return
    print(report)


def _returned(target: str) -> Any:
    """What the function that ``MODULE:FUNCTION`` names returns."""
    from tdhook_rl.errors import InputError, nearest

    module_name, _, name = target.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(
            f"{target!r} names no function: write MODULE:FUNCTION, such as 'my_agent:setup', with the module as "
            "`import` names it, not as a file"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:  # as for `python -m`; an installed command does not look there
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"no module is named {error.name!r}, in {folder} or among the installed ones") from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [other for other, value in vars(module).items() if callable(value)]
        raise InputError(f"{module_name!r} has no function {name!r}; {nearest(name, names)}")
    return function()


def _called(target: str) -> tuple[Any, ...]:
    """The same, checked to be a policy, an environment, perhaps arguments."""
    from tdhook_rl.errors import InputError

    made = _returned(target)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise InputError(
            f"{target} returned {got}: it must return (hooked policy, environment), or with collector arguments third"
        )
    return made


def _print_summary(console: Any, demo_report: Any, found: Any, folder: Path, report: Path) -> None:
    title = f"What was found in {found.seconds:.0f} s"
    _print_table(console, title, demo_report.COLUMNS, demo_report.summary(found))
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
