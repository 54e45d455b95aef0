"""Attributions with ``compile=True`` beside the same by hand under ``torch.compile``, and beside those without.

By hand is the gradient of bare tensors as a function of ``torch.func``, compiled whole. What compiling took, once for
each shape, is told and not part of the ratios.

python -m benchmarks.compiled_speed --pairs 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.actor_speed import path_by_hand, require_equal
from benchmarks.actors import ACTORS, OBSERVATION, ActorProblem
from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure, repetitions
from benchmarks.peers import STEPS, Run
from tdhook_rl import Saliency
from tdhook_rl.attribution import IntegratedGradients

__all__ = ["figures", "main"]

COMPILED, HAND, EAGER = "compile=True", "by hand, compiled", "annotate"
#: By method the actors and their rows.
CASES = {"Saliency": (("Categorical", 64), ("Categorical", 1024), ("TanhNormal", 1024), ("IMPALA", 8)),
         "IG": (("Categorical", 32),)}  # fmt: skip
SECONDS, LEAST_PAIRS = 8.0, 5


def figures(pairs: int = 20, only: str = "") -> Iterator[Figure]:
    """Measure, row by row.

    Args:
        pairs: interleaved rounds of each row.
        only: a part of ``"Saliency Categorical 64"``, say; rows without it are left out.
    """
    for what, cases in CASES.items():
        for name, rows in cases:
            if only in f"{what} {name} {rows}":
                yield from _measured(what, ACTORS[name](rows), pairs)


def _measured(what: str, problem: ActorProblem, pairs: int) -> list[Figure]:
    torch.compiler.reset()
    with ExitStack() as stack:
        ours = {name: _ours(what, problem, stack, compiles) for name, compiles in ((COMPILED, True), (EAGER, False))}
        runs = {COMPILED: ours[COMPILED], HAND: _by_hand(what, problem), EAGER: ours[EAGER]}
        took = {}
        for name in (COMPILED, HAND):
            started = time.perf_counter()
            runs[name]()
            took[name] = time.perf_counter() - started
        require_equal(runs, problem.name)
        repeat = repetitions(runs[COMPILED])
        once = sum(float(values[0]) for values in measure(runs, 1, repeat).values()) * repeat
        seconds = measure(runs, min(pairs, max(LEAST_PAIRS, int(SECONDS / once))), repeat)
    note = f"the first call {took[COMPILED]:.1f} s, by hand {took[HAND]:.1f} s"
    budgets = [Budget(HAND, 1.3, note), Budget(EAGER)]
    return figures_of(f"{what}, compiled", f"{problem.name} {len(problem.x)}", COMPILED, seconds, budgets)


def _ours(what: str, problem: ActorProblem, stack: ExitStack, compiles: bool) -> Run:
    options: dict[str, Any] = {"target": problem.target, "inputs": [OBSERVATION], "when": "batch", "compile": compiles}
    made = Saliency(**options) if what == "Saliency" else IntegratedGradients(n_steps=STEPS, **options)
    hooked = stack.enter_context(made.prepare(problem.policy))
    data = problem.data.copy().set(("baseline", OBSERVATION), problem.baseline)
    return lambda: hooked.annotate(data)["attr", OBSERVATION]


def _by_hand(what: str, problem: ActorProblem) -> Run:
    if what == "IG":
        return torch.compile(path_by_hand(problem.bare, problem, STEPS * len(problem.x)))

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: problem.bare(x, problem.data).sum())(x)

    compiled = torch.compile(gradient, fullgraph=True)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(problem.x)

    return run


def main(pairs: int, only: str) -> None:
    torch.set_num_threads(1)
    show(figures(pairs, only))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", default="", help="a part of a row's name, such as 'Saliency Categorical'")
    main(**vars(parser.parse_args()))
