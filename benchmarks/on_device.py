"""Attributions of actors on a device, beside the same by hand there: wall time, the device waited for.

python -m benchmarks.on_device
python -m benchmarks.on_device --device cpu --pairs 3 --batches 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.actors import ACTORS, OBSERVATION, ActorProblem
from benchmarks.budgeted import Budget, Figure, figures_of, header
from benchmarks.pairs import measure
from benchmarks.peers import STEPS
from tdhook_rl import Saliency
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.attribution.integrated_gradients import quadrature
from tdhook_rl.replaying.batching import repeat_rows

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
            for what, ours, hand in (
                ("Saliency", _ours(Saliency(target=problem.target, when="batch"), problem), _saliency(problem)),
                ("IG", _ours(_path_method(problem), problem), _path(problem)),
            ):
                runs = {"annotate": _waited(ours, device), HAND: _waited(hand, device)}
                _require_equal(ours(), hand(), f"{what} {name} {batch}")
                seconds = measure(runs, pairs, repeat=_repeats(runs["annotate"]), clock="wall")
                found += figures_of(what, f"{name} {batch}", "annotate", seconds, [Budget(HAND, 1.3)])
                print(found[-1], flush=True)
    return found


def _path_method(problem: ActorProblem) -> IntegratedGradients:
    return IntegratedGradients(target=problem.target, n_steps=STEPS, when="batch")


def _ours(method: Saliency | IntegratedGradients, problem: ActorProblem) -> Callable[[], Tensor]:
    hooked = method.prepare(problem.policy, return_context=False)
    data = problem.data.copy().set(("baseline", OBSERVATION), problem.baseline)
    return lambda: hooked.annotate(data)["attr", OBSERVATION]


def _saliency(problem: ActorProblem) -> Callable[[], Tensor]:
    def run() -> Tensor:
        x = problem.x.detach().requires_grad_()
        return torch.autograd.grad(problem.through(x, problem.data).sum(), x)[0]

    return run


def _path(problem: ActorProblem) -> Callable[[], Tensor]:
    x, baseline = problem.x, problem.baseline
    points, weights = (
        torch.tensor(values, dtype=x.dtype, device=x.device) for values in quadrature("gausslegendre", STEPS)
    )
    at_once = max(1, ROWS.get(problem.name, STEPS * len(x)) // len(x))
    parts = list(zip(points.split(at_once), weights.split(at_once), strict=True))
    rows = {len(alphas): repeat_rows(problem.data, len(alphas)) for alphas, _ in parts}

    def run() -> Tensor:
        total = torch.zeros_like(x)
        for alphas, shares in parts:
            path = torch.lerp(baseline, x, alphas.reshape(-1, *(1,) * x.ndim)).flatten(0, 1).requires_grad_()
            outer = shares.repeat_interleave(len(x))
            gradient = torch.autograd.grad(problem.through(path, rows[len(alphas)]), path, outer)[0]
            total += gradient.reshape(len(alphas), *x.shape).sum(0)
        return total * (x - baseline)

    return run


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


def _require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda text: f"{what}: {text}")


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
