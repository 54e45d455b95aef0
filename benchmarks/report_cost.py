"""What a report costs: of the run of a day, and of several such runs.

python -m benchmarks.report_cost
python -m benchmarks.report_cost --batches 1000 --keys 60 --runs 3

A run as a monitor writes it: so many batches with so many numbers each, histograms of a tenth of the names every fifth
batch, and four pictures every 25th. Timed is the command, from its start to the page: imports, reading and writing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.budgeted import Budget, Figure, figures_of, show
from tdhook_rl.report import DataTable, FolderSink, Histogram, Image

#: Of the time that it takes to import and parse: ten seconds beside four, for a day's run.
ALLOWED = 2.5
PARSING = "to import and parse"
PARSE = """
import json, pathlib, sys
import tdhook_rl.report
for folder in sys.argv[1:]:
    for path in pathlib.Path(folder).rglob("*.jsonl"):
        for line in path.open():
            json.loads(line)
"""


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


def figures(rounds: int = 3, batches: int = 1000, keys: int = 60, runs: Sequence[int] = (1, 5)) -> Iterator[Figure]:
    """The command beside a program that imports the library and parses the same lines; processor and wall.

    Args:
        rounds: of each.
        batches, keys: of a run.
        runs: how many go into one report.
    """
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / f"seed{seed}" for seed in range(max(runs))]
        for seed, folder in enumerate(folders):
            write_run(folder, batches, keys, seed)
        for count in runs:
            chosen = list(map(str, folders[:count]))
            commands = {
                "tdhook-rl report": ["-m", "tdhook_rl.cli", "report", *chosen, "--out", place],
                PARSING: ["-c", PARSE, *chosen],
            }
            wall, busy = ({name: np.zeros(rounds) for name in commands} for _ in range(2))
            for number in range(rounds):
                for name, command in commands.items():
                    start, before = time.perf_counter(), _processor()
                    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
                    wall[name][number], busy[name][number] = time.perf_counter() - start, _processor() - before
            size = (Path(place) / "report.html").stat().st_size / 1e6
            note = f"{np.median(wall['tdhook-rl report']):.1f} s by the wall, a page of {size:.1f} MB"
            budget = Budget(PARSING, ALLOWED if (count, batches) == (1, 1000) else None, note)
            case = f"{count} x {batches:,} batches, {keys} keys"
            yield from figures_of("a report, CPU", case, "tdhook-rl report", busy, [budget])


def main(batches: int, keys: int, runs: int, repeats: int) -> None:
    show(figures(repeats, batches, keys, tuple(dict.fromkeys((1, runs)))))


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
