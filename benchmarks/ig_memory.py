"""Peak memory of integrated gradients as steps and batch grow, each in a process of its own.

python -m benchmarks.ig_memory
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.nets import Problem, mlp
from benchmarks.peers import Run, captum, installed, ours, tdhook

STATUS = Path("/proc/self/status")
CONTENDERS = ("tdhook_rl", "captum", "tdhook")
BATCH, STEPS = 1024, 50
GROWING_STEPS = (10, 50, 100, 200, 400)
GROWING_BATCHES = (64, 256, 1024, 4096, 16384)
#: How much more one path may need than another, in MiB. A pass has at most 4096 rows, each activation of which is 1 MiB
#: here, and the allocator keeps some of them from one pass to the next.
SLACK = 16.0


def prepared(contender: str, problem: Problem, steps: int, stack: ExitStack) -> Run:
    """A run with the defaults of the contender."""
    if contender == "tdhook_rl":
        return ours("IntegratedGradients", problem, stack, steps=steps)[1]
    if contender == "captum":
        return captum("IntegratedGradients", problem, steps=steps)
    return tdhook("IntegratedGradients", problem, stack, steps=steps)


def resident(peak: bool = False) -> float:
    """What this process has in memory, or the most that it has had, in MiB."""
    if not STATUS.exists():  # elsewhere than in Linux: the most alone
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    name = "VmHWM" if peak else "VmRSS"
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) / 2**10


def increase(contender: str, batch: int, steps: int) -> float:
    """By how much one call raises the memory of this process at its highest, in MiB."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        prepared(contender, mlp(3, 64, 4), 2, stack)()  # what is loaded or built at the first use
        run = prepared(contender, mlp(3, 64, batch), steps, stack)
        if STATUS.exists():  # imports have had more than they keep, which would hide as much
            STATUS.with_name("clear_refs").write_text("5")
        before = resident()
        run()
        return resident(peak=True) - before


def in_process_of_its_own(contender: str, batch: int, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.ig_memory", "--one", contender, str(batch), str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def figures(
    rounds: int = 1, steps: Sequence[int] = GROWING_STEPS, batches: Sequence[int] = GROWING_BATCHES
) -> Iterator[Figure]:
    """Peaks beside those of peers, and of more steps or rows beside the fewest.

    Args:
        rounds: processes of each measurement.
        steps: tried at a batch of 1,024.
        batches: tried with 50 steps.
    """
    for what, points in (
        ("steps", [(BATCH, count) for count in steps]),
        ("rows", [(batch, STEPS) for batch in batches]),
    ):
        first = None
        for batch, count in points:
            found = {
                name: np.array([in_process_of_its_own(name, batch, count) for _ in range(rounds)])
                for name in CONTENDERS
                if name == "tdhook_rl" or installed(name)
            }
            fewest, first = first, found["tdhook_rl"] if first is None else first
            budgets = [Budget("captum", 1.0, "its defaults"), Budget("tdhook", 1.0, "its defaults")]
            if fewest is not None:
                fewer = f"{points[0][what == 'steps']} {what}"
                found[fewer] = fewest
                most = None if what == "rows" else float(1 + SLACK / np.median(fewest))
                budgets.append(Budget(fewer, most, f"{SLACK:.0f} MiB more" if most else ""))
            case = f"{batch} rows, {count} steps"
            yield from figures_of("peak memory of IG", case, "tdhook_rl", found, budgets, unit="MiB")


def main() -> None:
    # captum's internal_batch_size, which is off by default, bounds the steps at once as well.
    print("peak above what was there before the call, MiB (ReLU net, 3 hidden layers of 64; defaults of each)")
    show(figures())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "BATCH", "STEPS"), help="one measurement, in MiB")
    arguments = parser.parse_args()
    if arguments.one:
        name, rows, points = arguments.one
        print(increase(name, int(rows), int(points)))
    else:
        main()
