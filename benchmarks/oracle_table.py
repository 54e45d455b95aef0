"""Every method against an independent answer in float64, beside what captum and tdhook give on the same case.

python -m benchmarks.oracle_table

Numbers are the largest error over three random cases, in units of the largest expected value. "-" means that there is
no such method; words say what came instead of an answer.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.comparison import PEERS, ROWS, Row, compare
from tests.method_table import METHODS


def rows() -> list[Row]:
    """The rows of each method as its table has them, then those of metrics, probes, runs and estimators."""
    of_methods = [row for info in METHODS for row in info.oracles]
    return of_methods + [row for row in ROWS if row not in of_methods]


def heading(peer: str) -> str:
    try:
        return f"{peer} {version(peer)}"
    except PackageNotFoundError:
        return f"{peer} (not installed)"


def main(only: str, seeds: int) -> None:
    torch.set_num_threads(1)
    lines = [["method", "oracle", "largest error", *map(heading, PEERS)]]
    for row in rows():
        if only.lower() in row.method.lower():
            found = compare(row.make, seeds)
            lines.append([row.method, row.oracle, *(str(found[name]) for name in ("ours", *PEERS))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="methods with this in their name")
    parser.add_argument("--seeds", type=int, default=3)
    main(**vars(parser.parse_args()))
