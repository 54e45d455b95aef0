"""Saliency and integrated gradients beside the same by hand (the floor), captum and tdhook 0.3.0.

Of integrated gradients also with ``init_attr_targets``, a function of the user's, as tdhook has them.

python -m benchmarks.attribution_speed --pairs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.nets import Problem, impala, mlp
from benchmarks.pairs import measure, repetitions
from benchmarks.peers import STEPS, Run, by_hand, captum, installed, ours, tdhook

SALIENCY, IG, SEED_IG = "Saliency", "IntegratedGradients", "IG, init_attr_targets"
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
    Row(SALIENCY, partial(mlp, 3, 64, 1)),
    Row(SALIENCY, partial(mlp, 3, 64, 32)),
    Row(SALIENCY, partial(mlp, 3, 64, 64), floor_at_most=2.2),
    Row(SALIENCY, partial(mlp, 3, 64, 1024), floor_at_most=1.4),
    Row(SALIENCY, partial(mlp, 10, 100, 100)),
    Row(SALIENCY, partial(impala, 8)),
    Row(IG, partial(mlp, 3, 64, 1), captum_at_least=2.5),
    Row(IG, partial(mlp, 3, 64, 32), floor_at_most=1.3),
    Row(IG, partial(mlp, 3, 64, 1024), floor_at_most=1.3),
    Row(IG, partial(mlp, 10, 100, 100), floor_at_most=1.3),
    Row(SEED_IG, partial(mlp, 3, 64, 1), floor_at_most=2.0),
    Row(SEED_IG, partial(mlp, 3, 64, 32), floor_at_most=1.3),
    Row(SEED_IG, partial(mlp, 3, 64, 1024), floor_at_most=1.3),
    Row(IG, partial(impala, 8)),
)


def contenders(row: Row, problem: Problem, stack: ExitStack) -> tuple[dict[str, Run], dict[str, str]]:
    """The run of each contender, checked to compute the same, and the rows of a pass of those that were tuned.

    The floor is given its fastest chunk. captum takes part as it is called by default and, where another
    ``internal_batch_size`` is faster, tuned.
    """
    chunks: tuple[int | None, ...] = (None,)
    if row.method != SALIENCY:
        largest = STEPS * len(problem.x)
        chunks += tuple(size for size in CHUNKS[problem.name.split()[0]] if len(problem.x) <= size < largest)
    runs = dict(zip(FORMS, ours(row.method, problem, stack), strict=True))
    size, runs["floor"] = fastest({size: by_hand(row.method, problem, size) for size in chunks})
    notes = {"floor": "all" if size is None else str(size)} if row.method != SALIENCY else {}
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


def figures(pairs: int = 30, rows: Sequence[Row] = ROWS, seconds: float = ROW_SECONDS) -> Iterator[Figure]:
    """Measure, row by row.

    Args:
        pairs: interleaved rounds of each row.
        rows: which.
        seconds: of process CPU time that a row may take for more than its least rounds.
    """
    for row in rows:
        problem = row.build()
        with ExitStack() as stack:
            runs, notes = contenders(row, problem, stack)
            repeat = max(repetitions(run) for run in (runs["floor"], *(runs[form] for form in FORMS)))
            once = sum(float(values[0]) for values in measure(runs, 1, repeat).values()) * repeat
            spent = measure(runs, min(pairs, max(LEAST_PAIRS, int(seconds / once))), repeat)
        case, tuned = f"{problem.name}, {len(problem.x)}", notes.get("captum tuned")
        floor = f"passes of {notes['floor']} rows" if "floor" in notes else ""
        budgets = [
            Budget("floor", row.floor_at_most, floor),
            Budget("captum", 1 / row.captum_at_least),
            Budget("captum tuned", 1.0, f"internal_batch_size={tuned}"),
            Budget("tdhook", 1.0),
        ]
        for form in FORMS:
            yield from figures_of(row.method, case, form, spent, budgets)


def main(pairs: int, only: str) -> None:
    torch.set_num_threads(1)
    show(figures(pairs, [row for row in ROWS if only in row.method]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", default="", help="part of a method's name")
    main(**vars(parser.parse_args()))
