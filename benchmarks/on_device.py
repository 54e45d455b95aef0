"""Attributions of actors on a device, beside the same by hand there: wall time, the device waited for.

python -m benchmarks.on_device
python -m benchmarks.on_device --device cpu --pairs 3 --batches 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.actor_speed import gradient_by_hand, path_by_hand, require_equal
from benchmarks.actors import ACTORS, OBSERVATION, ActorProblem
from benchmarks.budgeted import Budget, Figure, figures_of, header
from benchmarks.pairs import measure
from benchmarks.peers import STEPS
from tdhook_rl import Saliency
from tdhook_rl.attribution import IntegratedGradients

HAND = "by hand through the actor"
NAMES = ("Categorical", "TanhNormal", "IMPALA")
#: Rows of one pass by hand, which must fit a device.
ROWS = {"IMPALA": 8192}


def figures(device: str, pairs: int, batches: Sequence[int]) -> list[Figure]:
    """Saliency and integrated gradients of each actor and batch, on a device."""
    found = []
    for name in NAMES:
        for batch in batches:
            with torch.device(device):
                problem = ACTORS[name](batch)
            for what, method, hand in (
                ("Saliency", Saliency(target=problem.target, when="batch"), partial(_saliency, problem)),
                ("IG", IntegratedGradients(target=problem.target, n_steps=STEPS, when="batch"), _path(problem)),
            ):
                contenders = {"annotate": _ours(method, problem), HAND: hand}
                require_equal(contenders, name)
                runs = {who: _waited(run, device) for who, run in contenders.items()}
                seconds = measure(runs, pairs, repeat=_repeats(runs["annotate"]), clock="wall")
                found += figures_of(what, f"{name} {batch}", "annotate", seconds, [Budget(HAND, 1.3)])
                print(found[-1], flush=True)
    return found


def _saliency(problem: ActorProblem) -> Tensor:
    return gradient_by_hand(problem.through, problem.x, problem.data)


def _path(problem: ActorProblem) -> Callable[[], Tensor]:
    return path_by_hand(problem.through, problem, ROWS.get(problem.name, STEPS * len(problem.x)))


def _ours(method: Saliency | IntegratedGradients, problem: ActorProblem) -> Callable[[], Tensor]:
    hooked = method.prepare(problem.policy, return_context=False)
    data = problem.data.copy().set(("baseline", OBSERVATION), problem.baseline)
    return lambda: hooked.annotate(data)["attr", OBSERVATION]


def _waited(run: Callable[[], Tensor], device: str) -> Callable[[], None]:
    def waited() -> None:
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return waited


def _repeats(run: Callable[[], None], seconds: float = 0.02) -> int:
    run()
    start = time.perf_counter()
    run()
    return max(1, round(seconds / (time.perf_counter() - start)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 1024])
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device here (torch.cuda.is_available() is False): --device cpu runs it there"
        )
    print(header())
    missed = [one for one in figures(asked.device, asked.pairs, asked.batches) if one.met is False]
    print(f"{len(missed)} of the budgets are missed" if missed else "all budgets are met")
