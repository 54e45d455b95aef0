"""The program ``tdhook-rl``: its commands, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

from tdhook_rl import __version__
from tdhook_rl.cli import analyze, check, demo, experiment, play, probe, report, sites, steer
from tdhook_rl.cli.interrupts import Stop, leave
from tdhook_rl.cli.options import with_values

__all__ = ["main"]

#: In the order of the help.
COMMANDS = (demo, experiment, report, check, sites, play, analyze, probe, steer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for an error that has a message, 130 for Ctrl-C, 141 where nobody
    reads what is printed any more.

    As a program, Ctrl-C ends it in one line wherever it is: while packages are imported, workers start, or at its end.
    """
    stop = Stop()
    try:
        with stop:
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        with contextlib.suppress(OSError):  # what is written on the way out would end in another
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        # What is interrupted may end in an error of its own: an import, a library's loop.
        if not (stop.requested or isinstance(error, KeyboardInterrupt)) or isinstance(error, SystemExit):
            raise
        print("tdhook-rl: stopped", file=sys.stderr)
        if arguments is None:
            leave()
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no such letter shows a question mark
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(with_values(given))
    options.written = shlex.join(["tdhook-rl", *given])
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
    parser.add_argument("--version", action="version", version=f"tdhook-rl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
