"""Saliency and integrated gradients beside the same by hand, captum and tdhook 0.3.0.

python -m benchmarks.attribution_speed --pairs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.nets import Problem, impala, mlp
from benchmarks.pairs import Median, measure, repetitions
from benchmarks.peers import PEERS, STEPS, Run, by_hand, captum, installed, ours, tdhook

IG = "IntegratedGradients"
FORMS = ("hooked(td)", "annotate")
#: Rows of one pass that the floor and captum are tried with; the fastest is timed.
CHUNKS = {"MLP": (512, 1024, 2048, 4096, 8192, 16384), "IMPALA": (8, 16, 32, 64, 128)}
#: A row of slow runs gets fewer pairs, but not fewer than these.
ROW_SECONDS, LEAST_PAIRS = 90.0, 7


@dataclass(frozen=True)
class Row:
    """One comparison and what is accepted in it: at most so many times the floor, so many times faster than captum."""

    method: str
    build: Callable[[], Problem]
    floor_at_most: float | None = None
    captum_at_least: float = 1.0


ROWS = (
    Row("Saliency", partial(mlp, 3, 64, 1)),
    Row("Saliency", partial(mlp, 3, 64, 32)),
    Row("Saliency", partial(mlp, 3, 64, 64), floor_at_most=2.2),
    Row("Saliency", partial(mlp, 3, 64, 1024), floor_at_most=1.4),
    Row("Saliency", partial(mlp, 10, 100, 100)),
    Row("Saliency", partial(impala, 8)),
    Row(IG, partial(mlp, 3, 64, 1), captum_at_least=2.5),
    Row(IG, partial(mlp, 3, 64, 32), floor_at_most=1.3),
    Row(IG, partial(mlp, 3, 64, 1024), floor_at_most=1.3),
    Row(IG, partial(mlp, 10, 100, 100), floor_at_most=1.3),
    Row(IG, partial(impala, 8)),
)


def contenders(row: Row, problem: Problem, stack: ExitStack) -> tuple[dict[str, Run], dict[str, str]]:
    """The run of each contender, checked to compute the same; and the chunk that suits the floor and captum best."""
    chunks: tuple[int | None, ...] = (None,)
    if row.method == IG:
        largest = STEPS * len(problem.x)
        chunks += tuple(size for size in CHUNKS[problem.name.split()[0]] if len(problem.x) <= size < largest)
    floors = {_label(size): by_hand(row.method, problem, size) for size in chunks}
    runs = dict(zip(FORMS, ours(row.method, problem, stack), strict=True))
    notes = {}
    notes["floor"], runs["floor"] = fastest(floors)
    if installed("captum"):
        variants = {_label(size): captum(row.method, problem, size) for size in chunks}
        notes["captum"], runs["captum"] = fastest(variants)
    if installed("tdhook"):
        runs["tdhook"] = tdhook(row.method, problem, stack)
    require_equal(runs)
    return runs, notes if row.method == IG else {}


def fastest(variants: Mapping[str, Run]) -> tuple[str, Run]:
    if len(variants) > 1:
        seconds = measure(variants, rounds=3)
        name = min(variants, key=lambda one: seconds[one].min())
    else:
        name = next(iter(variants))
    return name, variants[name]


def require_equal(runs: Mapping[str, Run]) -> None:
    expected = runs["floor"]().detach()
    scale = float(expected.abs().max())
    if scale < 1e-3:
        raise AssertionError(f"the attributions vanish (at most {scale:.1e}): equality would show nothing")
    for name, run in runs.items():
        found: Tensor = run().detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def report(row: Row, pairs: int) -> list[str]:
    problem = row.build()
    with ExitStack() as stack:
        runs, notes = contenders(row, problem, stack)
        repeat = min(repetitions(run) for run in runs.values())
        repeat = max(repeat, repetitions(runs["floor"]))
        once = sum(float(values[0]) for values in measure(runs, 1, repeat).values()) * repeat
        pairs = min(pairs, max(LEAST_PAIRS, int(ROW_SECONDS / once)))
        seconds = measure(runs, pairs, repeat)
    lines = []
    for form in FORMS:
        floor = Median.of(seconds[form] / seconds["floor"])
        columns = [f"{row.method:20}{problem.name:19}{len(problem.x):>5}  {form:11}"]
        for name in (form, "floor", *PEERS):
            columns.append(f"{Median.of(seconds[name]).median * 1e3:9.3f}" if name in seconds else f"{'-':>9}")
        columns.append(f"  {_interval(floor):21}")
        verdicts = []
        if row.floor_at_most is not None:
            verdicts.append(f"floor x{row.floor_at_most}: {_verdict(floor.median <= row.floor_at_most)}")
        for peer in PEERS:
            if peer not in seconds:
                columns.append(f"{'not installed':21}")
                continue
            ratio = Median.of(seconds[peer] / seconds[form])
            columns.append(f"{_interval(ratio):21}")
            least = row.captum_at_least if peer == "captum" else 1.0
            verdicts.append(f"{peer} x{least:g}: {_verdict(ratio.median >= least)}")
        lines.append("".join(columns) + "  ".join(verdicts))
    chosen = ", ".join(f"{name}: {label}" for name, label in notes.items())
    lines.append(f"{'':20}{pairs} pairs of {repeat} calls" + (f"; rows of a pass: {chosen}" if chosen else ""))
    return lines


def main(pairs: int, only: str) -> None:
    torch.set_num_threads(1)
    heads = ("method", "net", "batch", "form", "ours ms", "floor", "captum", "tdhook")
    print("{:20}{:19}{:>5}  {:11}{:>9}{:>9}{:>9}{:>9}".format(*heads), end="")
    print("  {:21}{:21}{:21}{}".format("ours / floor", "captum / ours", "tdhook / ours", "accepted"))
    for row in ROWS:
        if only in row.method:
            print("\n".join(report(row, pairs)), flush=True)


def _label(size: int | None) -> str:
    return "all" if size is None else str(size)


def _interval(found: Median) -> str:
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "FAILS"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", default="", help="part of a method's name")
    main(**vars(parser.parse_args()))
