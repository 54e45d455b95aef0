"""``tdhook-rl check``: try a hooked policy before training."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tdhook_rl.cli.setups import EXAMPLE, made_with_environment

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    check = commands.add_parser(
        "check",
        help="try a hooked policy in its environment and collector before training",
        description="Make a dry run on copies and list what would fail or go wrong in silence; exits 1 on an error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument(
        "target",
        nargs="?",
        default=EXAMPLE,
        metavar="MODULE:FUNCTION",
        help="returns (hooked policy, environment) or (..., collector arguments), and takes no argument",
    )
    check.add_argument("--compile", action="store_true", help="look for graph breaks and recompilations as well")
    check.add_argument("--workers", type=int, default=0, help="run a MultiSyncCollector with so many processes")
    check.add_argument("--steps", type=int, default=16, help="steps of the environment that are looked at one by one")
    check.add_argument("--time-limit", type=float, default=120.0, help="seconds, whatever it waits for")
    check.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torchrl

    from tdhook_rl.rollout import check

    torchrl.logger.setLevel("ERROR")
    policy, env, *rest = made_with_environment(options.target)
    arguments = dict(rest[0] if rest else {})
    if options.workers:
        arguments["num_workers"] = options.workers
    report = check(policy, env, arguments, steps=options.steps, compile=options.compile, time_limit=options.time_limit)
    _show(report)
    return 0 if report.ok else 1


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
