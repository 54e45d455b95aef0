"""``tdhook-rl report``: one page of a run, or of several, whoever has written them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser."""
    report = commands.add_parser(
        "report",
        help="make one page of a run, or of several",
        description="Read the folder of a run (of this library, of TorchRL's CSVLogger, an offline run of W&B, event "
        "files of TensorBoard, an analysis of a replay buffer), also of one that crashed, and write report.html.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    report.add_argument("--out", type=Path, default=None, help="a folder for report.html (that of the first run)")
    report.add_argument("--title", default="", help="of the page (the names of the runs)")
    report.add_argument(
        "--megabytes", type=_megabytes, default=6.0, help="of pictures and animations in the page (default: 6)"
    )
    report.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from tdhook_rl.report import page_of
    from tdhook_rl.report.runs import read_run

    runs = [read_run(path) for path in options.runs]
    page = page_of(runs, title=options.title, most_bytes=options.megabytes * 1e6)
    path = page.save((options.out or runs[0].path) / "report.html")
    print(f"  {path}  the report: open it in a browser")
    return 0


def _megabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e4:
        raise argparse.ArgumentTypeError(f"a number of megabytes from 0 on, got {text!r}")
    return number
