"""What a report costs: of the run of a day, and of several such runs.

python -m benchmarks.report_cost
python -m benchmarks.report_cost --batches 1000 --keys 60 --runs 3

A run as a monitor writes it: so many batches with so many numbers each, histograms of a tenth of the names every fifth
batch, and four pictures every 25th. Timed is the command, from its start to the page: imports, reading and writing.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tdhook_rl.report import DataTable, FolderSink, Histogram, Image

#: Seconds that the report of one run may take.
ALLOWED = 10.0


def write_run(folder: Path, batches: int, keys: int, seed: int) -> None:
    """A run of a day, with names as a monitor gives them."""
    draw = np.random.default_rng(seed)
    names = ["episodes.return", *(f"mass.observation.part {n}" for n in range(5))]
    for probe in ("door", "key", "goal"):
        score = f"probe.{probe}.accuracy"
        names += [
            score,
            f"{score}_low",
            f"{score}_high",
            f"{score}.input",
            f"{score}.shuffled",
            f"probe.{probe}.groups",
        ]
    names += [f"{what}.net.{layer}" for layer in range(3) for what in ("dormant", "effective_rank", "cka_first")]
    names.append("attr.observation")
    names += [f"attr.observation.feature {n}" for n in range(max(0, keys - len(names)))]
    curves = draw.normal(size=(batches, len(names[:keys]))).cumsum(0)
    sink = FolderSink(folder)
    sink.describe({"seed": seed, "methods": ["Saliency()", "ActivationCaching()"]})
    for batch in range(batches):
        logged: dict[str, object] = dict(zip(names, (0.5 + curves[batch] / 100).tolist(), strict=False))
        if batch % 5 == 0:
            logged |= {f"hist.net.{n}": Histogram.of(draw.normal(size=512)) for n in range(keys // 10)}
        if batch % 25 == 0:
            logged |= {f"overlay.{n}": Image(draw.integers(0, 255, (84, 84, 3), dtype=np.uint8)) for n in range(4)}
            logged["episodes"] = DataTable(["episode", "return"], [[n, float(n)] for n in range(10)])
        sink.log(logged, 2048 * (batch + 1))
    sink.summarise({})
    sink.close()


def main(batches: int, keys: int, runs: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / f"seed{seed}" for seed in range(runs)]
        for seed, folder in enumerate(folders):
            write_run(folder, batches, keys, seed)
        print(f"{batches} batches of {keys} numbers, {keys // 10} histograms every 5, 4 pictures every 25")
        print("runs | seconds | of the processor | allowed | megabytes of the page")
        for count in dict.fromkeys((1, runs)):
            command = [sys.executable, "-m", "tdhook_rl.cli", "report", *map(str, folders[:count]), "--out", place]
            seconds, busy = [], []
            for _ in range(repeats):
                start, before = time.perf_counter(), _processor()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start)
                busy.append(_processor() - before)
            size = (Path(place) / "report.html").stat().st_size / 1e6
            allowed = f"{ALLOWED:.0f}" if count == 1 else "-"
            wall, process = statistics.median(seconds), statistics.median(busy)
            print(f"{count:4} | {wall:7.1f} | {process:16.1f} | {allowed:>7} | {size:.1f}", flush=True)


def _processor() -> float:
    """Seconds that programs which have ended took of the processor: other programs make the clock's longer."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))
