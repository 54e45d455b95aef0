"""Saliency and integrated gradients beside the same by hand (the floor), captum and tdhook 0.3.0.

python -m benchmarks.attribution_speed --pairs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.nets import Problem, impala, mlp
from benchmarks.pairs import Median, measure, repetitions
from benchmarks.peers import STEPS, Run, by_hand, captum, installed, ours, tdhook

IG = "IntegratedGradients"
FORMS = ("hooked(td)", "annotate")
#: Rows of one pass that the floor and captum are tried with.
CHUNKS = {"MLP": (512, 1024, 2048, 4096, 8192, 16384), "IMPALA": (8, 16, 32, 64, 128)}
#: A comparison of slow runs gets fewer pairs, but not fewer than these.
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
    """The run of each contender, checked to compute the same, and the rows of a pass of those that were tuned.

    The floor is given its fastest chunk. captum takes part as it is called by default and, where another
    ``internal_batch_size`` is faster, tuned.
    """
    chunks: tuple[int | None, ...] = (None,)
    if row.method == IG:
        largest = STEPS * len(problem.x)
        chunks += tuple(size for size in CHUNKS[problem.name.split()[0]] if len(problem.x) <= size < largest)
    runs = dict(zip(FORMS, ours(row.method, problem, stack), strict=True))
    size, runs["floor"] = fastest({size: by_hand(row.method, problem, size) for size in chunks})
    notes = {"floor": "all" if size is None else str(size)} if row.method == IG else {}
    if installed("captum"):
        runs["captum"] = captum(row.method, problem)
        size, tuned = fastest({size: captum(row.method, problem, size) for size in chunks})
        if size is not None:
            runs["captum tuned"], notes["captum tuned"] = tuned, str(size)
    if installed("tdhook"):
        runs["tdhook"] = tdhook(row.method, problem, stack)
    require_equal(runs)
    return runs, notes


def fastest(variants: Mapping[int | None, Run]) -> tuple[int | None, Run]:
    best = next(iter(variants))
    if len(variants) > 1:
        seconds = measure({str(size): run for size, run in variants.items()}, rounds=3)
        best = min(variants, key=lambda size: float(seconds[str(size)].min()))
    return best, variants[best]


def require_equal(runs: Mapping[str, Run]) -> None:
    expected = runs["floor"]().detach()
    scale = float(expected.abs().max())
    if scale < 1e-3:
        raise AssertionError(f"the attributions vanish (at most {scale:.1e}): equality would show nothing")
    for name, run in runs.items():
        torch.testing.assert_close(
            run().detach(), expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def report(row: Row, pairs: int) -> list[str]:
    problem = row.build()
    with ExitStack() as stack:
        runs, notes = contenders(row, problem, stack)
        repeat = max(repetitions(run) for run in (runs["floor"], *(runs[form] for form in FORMS)))
        once = sum(float(values[0]) for values in measure(runs, 1, repeat).values()) * repeat
        pairs = min(pairs, max(LEAST_PAIRS, int(ROW_SECONDS / once)))
        seconds = measure(runs, pairs, repeat)
    lines = []
    for form in FORMS:
        columns = [f"{row.method:20}{problem.name:19}{len(problem.x):>5}  {form:11}"]
        columns += [_milliseconds(seconds.get(name)) for name in (form, "floor", "captum", "tdhook")]
        against_floor = Median.of(seconds[form] / seconds["floor"])
        columns.append(f"  {_interval(against_floor):21}")
        verdicts = []
        if row.floor_at_most is not None:
            verdicts.append(_verdict(f"floor <= {row.floor_at_most:g}", against_floor.median <= row.floor_at_most))
        for peer, least in (("captum", row.captum_at_least), ("tdhook", 1.0)):
            if peer not in seconds:
                columns.append(f"{'not installed':21}")
                continue
            ratio = Median.of(seconds[peer] / seconds[form])
            columns.append(f"{_interval(ratio):21}")
            verdicts.append(_verdict(f"{peer} > {least:g}", ratio.median > least))
        lines.append("".join(columns) + ", ".join(verdicts))
        if "captum tuned" in seconds:
            ratio = Median.of(seconds["captum tuned"] / seconds[form])
            size, spent = notes["captum tuned"], _milliseconds(seconds["captum tuned"]).strip()
            lines.append(
                f"{'':46}beside captum with internal_batch_size={size} ({spent} ms): captum / ours {_interval(ratio)}"
                f" {_verdict('> 1', ratio.median > 1)}"
            )
    floor = f", rows of a pass of the floor: {notes['floor']}" if "floor" in notes else ""
    lines.append(f"{'':46}{pairs} pairs of {repeat} calls{floor}")
    return lines


def main(pairs: int, only: str) -> None:
    torch.set_num_threads(1)
    print(
        f"{'method':20}{'net':19}{'batch':>5}  {'form':11}{'ours ms':>9}{'floor':>9}{'captum':>9}{'tdhook':>9}"
        f"  {'ours / floor':21}{'captum / ours':21}{'tdhook / ours':21}accepted"
    )
    for row in ROWS:
        if only in row.method:
            print("\n".join(report(row, pairs)), flush=True)


def _milliseconds(seconds: np.ndarray | None) -> str:
    return f"{'-':>9}" if seconds is None else f"{float(np.median(seconds)) * 1e3:9.3f}"


def _interval(found: Median) -> str:
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _verdict(line: str, holds: bool) -> str:
    return f"{line}: {'holds' if holds else 'FAILS'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", default="", help="part of a method's name")
    main(**vars(parser.parse_args()))
