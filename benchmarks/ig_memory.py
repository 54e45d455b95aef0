"""Peak memory of integrated gradients as steps and batch grow, each in a process of its own.

python -m benchmarks.ig_memory
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from contextlib import ExitStack

import torch

from benchmarks.nets import Problem, mlp
from benchmarks.peers import Run, captum, installed, ours, tdhook

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


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def increase(contender: str, batch: int, steps: int) -> float:
    """By how much one call raises the peak of this process, in MiB."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        prepared(contender, mlp(3, 64, 4), 2, stack)()  # what is loaded or built at the first use
        run = prepared(contender, mlp(3, 64, batch), steps, stack)
        before = peak()
        run()
        return peak() - before


def in_process_of_its_own(contender: str, batch: int, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.ig_memory", "--one", contender, str(batch), str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(points: list[tuple[int, int]]) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in CONTENDERS if name == "tdhook_rl" or installed(name)}
    for batch, steps in points:
        line = f"{batch:>8}{steps:>7}"
        for name in CONTENDERS:
            if name in measured:
                measured[name].append(in_process_of_its_own(name, batch, steps))
                line += f"{measured[name][-1]:>14.0f}"
            else:
                line += f"{'not installed':>14}"
        print(line, flush=True)
    return measured


def main() -> None:
    # captum's internal_batch_size, which is off by default, bounds the steps at once as well.
    print("peak above what was there before the call, MiB (ReLU net, 3 hidden layers of 64; defaults of each)")
    print(f"{'batch':>8}{'steps':>7}" + "".join(f"{name:>14}" for name in CONTENDERS))
    by_steps = table([(BATCH, steps) for steps in GROWING_STEPS])["tdhook_rl"]
    by_batch = table([(batch, STEPS) for batch in GROWING_BATCHES])["tdhook_rl"]
    flat = max(by_steps) - min(by_steps)
    print(f"tdhook_rl from {GROWING_STEPS[0]} to {GROWING_STEPS[-1]} steps: {flat:+.0f} MiB", end="")
    print(f" (bounded by the chunk: {'holds' if flat <= SLACK else 'FAILS'})")
    print(f"tdhook_rl from {GROWING_BATCHES[0]} to {GROWING_BATCHES[-1]} rows: {by_batch[-1] - by_batch[0]:+.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "BATCH", "STEPS"), help="one measurement, in MiB")
    arguments = parser.parse_args()
    if arguments.one:
        name, rows, points = arguments.one
        print(increase(name, int(rows), int(points)))
    else:
        main()
