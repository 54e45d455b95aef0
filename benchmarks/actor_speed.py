"""Attributions of actors beside three references: by hand over bare tensors, by hand through the actor, and captum.

What somebody writes who needs one policy explained, and nothing checked, reads the weights of its network and calls
no TensorDict ("bare"); what everybody can write for every actor calls its ``get_dist`` ("by hand"); captum is given a
function that does that. Every contender is checked to compute the same. :func:`figures` returns the table.

Budgets are what was asked for, kept where they are missed. What is left of one call of ``annotate`` on one row of a
chain is some 110 microseconds beside passes of 90: 10 for a look at the weights (others may write them past autograd,
and what was computed with them is then nobody's), 5 for the comparison with what the policy had put out, 30 for masks,
stamps and nodes, the rest for keys and checks. Networks that are no chain (a GRU) are run again through tensordict's
modules, which is what they cost by hand through the actor, and all that is found on the way is looked at.

python -m benchmarks.actor_speed --pairs 30 --only Saliency
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import Tensor

from benchmarks.actors import ACTORS, OBSERVATION, ActorProblem, Score
from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure, repetitions
from benchmarks.peers import STEPS, Run, installed
from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.attribution.integrated_gradients import quadrature
from tdhook_rl.replaying.batching import repeat_rows

BARE, HAND, CAPTUM = "bare by hand", "by hand through the actor", "captum over the actor"
#: Rows of one pass that integrated gradients by hand are tried with.
CHUNKS = {"IMPALA": (32, 64), "else": (1024, 2048, 4096)}
#: A measurement of slow runs gets fewer rounds, but not fewer than these.
SECONDS, LEAST_PAIRS = 20.0, 5
#: Of the norm. In float32 another order of operations takes the other side of a ReLU or a maximum here and there:
#: captum's path of IMPALA's network differs by 8e-4, the others by 1e-7.
EQUAL = {"IMPALA": 2e-3, "else": 1e-5}
#: Attributions of one ``Compose``.
SEVERAL = 8

BATCHES = (1, 32, 64, 1024)
FRAMES = (1, 32, 64)  # of the convolutional net


def figures(pairs: int = 20, only: str = "") -> Iterator[Figure]:
    """Measure, row by row.

    Args:
        pairs: interleaved rounds of each row.
        only: a part of ``"Saliency Categorical 64"``, say; rows without it are left out.
    """
    kinds = (("Saliency", _saliency), ("IG", _integrated), ("Step", _step), ("Compose", _compose))
    for what, measured in kinds:
        for name, make in ACTORS.items():
            frames = FRAMES if what != "IG" else (8,)
            for batch in frames if name == "IMPALA" else BATCHES:
                if only in f"{what} {name} {batch}":
                    yield from measured(make(batch), pairs)


# ------------------------------------------------------------------ what is measured


def _saliency(problem: ActorProblem, pairs: int) -> list[Figure]:
    batch = len(problem.x)
    with ExitStack() as stack:
        hooked = stack.enter_context(
            Saliency(target=problem.target, inputs=[OBSERVATION], when="batch").prepare(problem.policy)
        )
        runs = {
            "annotate": lambda: hooked.annotate(problem.data)["attr", OBSERVATION],
            BARE: lambda: gradient_by_hand(problem.bare, problem.x, problem.data),
            HAND: lambda: gradient_by_hand(problem.through, problem.x, problem.data),
        }
        if installed("captum"):
            runs[CAPTUM] = _captum_saliency(problem)
        budgets = [
            Budget(BARE, 1.8 if problem.is_chain else None),
            Budget(HAND, 1.2),
            Budget(CAPTUM, 1.0 if batch >= 32 else None),
        ]
        return _measured("Saliency", problem, "annotate", runs, budgets, pairs)


def _integrated(problem: ActorProblem, pairs: int) -> list[Figure]:
    batch = len(problem.x)
    data = problem.data.copy().set(("baseline", OBSERVATION), problem.baseline)
    kind = "IMPALA" if problem.name == "IMPALA" else "else"
    sizes = [STEPS * batch, *(size for size in CHUNKS[kind] if batch <= size < STEPS * batch)]
    with ExitStack() as stack:
        made = IntegratedGradients(target=problem.target, inputs=[OBSERVATION], n_steps=STEPS, when="batch")
        hooked = stack.enter_context(made.prepare(problem.policy))
        runs = {
            "annotate": lambda: hooked.annotate(data)["attr", OBSERVATION],
            BARE: _fastest([path_by_hand(problem.bare, problem, size) for size in sizes]),
            HAND: _fastest([path_by_hand(problem.through, problem, size) for size in sizes]),
        }
        if installed("captum"):
            runs[CAPTUM] = _captum_path(problem)
        most = 2.0 if batch == 1 else 1.3
        return _measured("IG", problem, "annotate", runs, [Budget(BARE, most), Budget(HAND), Budget(CAPTUM)], pairs)


def _step(problem: ActorProblem, pairs: int) -> list[Figure]:
    """The policy acts and is explained, as in a step of a collector."""
    policy, out_keys = problem.policy, problem.policy.out_keys
    given = problem.data.exclude(*out_keys)

    def by_hand() -> Tensor:
        with torch.no_grad():
            data = policy(given.copy())
        gradient = gradient_by_hand(problem.through, data[OBSERVATION], data)
        data.set(("attr", OBSERVATION), gradient)
        return gradient

    with ExitStack() as stack:
        hooked = stack.enter_context(Saliency(target=problem.target, inputs=[OBSERVATION], when="step").prepare(policy))

        def ours() -> Tensor:
            with torch.no_grad():
                return hooked(given.copy())["attr", OBSERVATION]

        runs = {"hooked(td)": ours, "the two passes by hand": by_hand}
        budgets = [Budget("the two passes by hand", 1.25)]
        return _measured("Step", problem, "hooked(td)", runs, budgets, pairs)


def _compose(problem: ActorProblem, pairs: int) -> list[Figure]:
    """Eight saliencies of one policy, beside one forward and eight times backward."""
    key = {"value": "state_value", "Q": "action_value", "TanhNormal": "loc"}.get(problem.name, "logits")
    width = problem.data[key].shape[-1]
    methods = [
        Saliency(
            target=targets.logit(index % width, key),
            inputs=[OBSERVATION],
            when="batch",
            attribution_key=f"attr{index}",
            absolute=index >= width,
        )
        for index in range(SEVERAL)
    ]
    policy = problem.policy
    run_to = policy.module[0] if isinstance(policy, TensorDictSequential) else policy
    reads = [key for key in policy.in_keys if key != OBSERVATION]

    def by_hand() -> Tensor:
        x = problem.x.detach().requires_grad_()
        entries = {OBSERVATION: x} | {key: problem.data[key] for key in reads}
        output = run_to(TensorDict(entries, batch_size=len(x)))[key]
        found = []
        for index in range(SEVERAL):
            explained = output[..., index % width].sum()
            found.append(torch.autograd.grad(explained, x, retain_graph=index < SEVERAL - 1)[0])
        return torch.stack([one.abs() if index >= width else one for index, one in enumerate(found)])

    with ExitStack() as stack:
        hooked = stack.enter_context(Compose(*methods).prepare(policy))

        def ours() -> Tensor:
            data = hooked.annotate(problem.data)
            return torch.stack([data[f"attr{index}", OBSERVATION] for index in range(SEVERAL)])

        runs = {"annotate, 8 of them": ours, "one forward, 8 backward": by_hand}
        budgets = [Budget("one forward, 8 backward", 1.5)]
        return _measured("Compose", problem, "annotate, 8 of them", runs, budgets, pairs)


def _measured(
    what: str, problem: ActorProblem, ours: str, runs: dict[str, Run], budgets: list[Budget], pairs: int
) -> list[Figure]:
    require_equal(runs, problem.name)
    repeat = repetitions(runs[ours])
    once = sum(float(values[0]) for values in measure(runs, 1, repeat).values()) * repeat
    seconds = measure(runs, min(pairs, max(LEAST_PAIRS, int(SECONDS / once))), repeat)
    return figures_of(what, f"{problem.name} {len(problem.x)}", ours, seconds, budgets)


def require_equal(runs: dict[str, Run], net: str) -> None:
    """Raise where the contenders do not compute the same, but for the rounding that :data:`EQUAL` allows a network."""
    found, allowed = {}, EQUAL.get(net, EQUAL["else"])
    for name, run in runs.items():
        torch.manual_seed(0)  # a step draws its action
        found[name] = run().detach()
    expected = next(iter(found.values()))
    for name, value in found.items():
        gap = float((value - expected).norm() / expected.norm())
        if not gap <= allowed:
            raise AssertionError(f"{name} gives something else: it differs by {gap:.1e} of the norm")


# ------------------------------------------------------------------ by hand, and captum


def gradient_by_hand(score: Score, x: Tensor, data: TensorDict) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(score(x, data).sum(), x)[0]


def path_by_hand(score: Score, problem: ActorProblem, size: int) -> Run:
    """Integrated gradients by hand with so many rows a pass; what the rows are beside is made ready before."""
    x, baseline = problem.x, problem.baseline
    points, weights = (torch.tensor(one, dtype=x.dtype, device=x.device) for one in quadrature("gausslegendre", STEPS))
    at_once = max(1, size // len(x))
    parts = list(zip(points.split(at_once), weights.split(at_once), strict=True))
    rows = {len(alphas): repeat_rows(problem.data, len(alphas)) for alphas, _ in parts}

    def run() -> Tensor:
        total = torch.zeros_like(x)
        for alphas, shares in parts:
            path = torch.lerp(baseline, x, alphas.reshape(-1, *(1,) * x.ndim)).flatten(0, 1).requires_grad_()
            outer = shares.repeat_interleave(len(x))
            gradient = torch.autograd.grad(score(path, rows[len(alphas)]), path, outer)[0]
            total += gradient.reshape(len(alphas), *x.shape).sum(0)
        return total * (x - baseline)

    return run


def _fastest(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    seconds = measure({str(index): run for index, run in enumerate(runs)}, rounds=3)
    return runs[min(range(len(runs)), key=lambda index: float(seconds[str(index)].min()))]


def _forward_for_captum(problem: ActorProblem) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of tensors, and those beside the observation; captum repeats them along a path."""
    keys = [key for key in problem.data.keys() if key != OBSERVATION and isinstance(problem.data[key], Tensor)]

    def forward(x: Tensor, *others: Tensor) -> Tensor:
        return problem.through(x, TensorDict(dict(zip(keys, others, strict=True)), batch_size=len(x)))

    return forward, tuple(problem.data[key] for key in keys)


def _captum_saliency(problem: ActorProblem) -> Run:
    from captum import attr

    forward, others = _forward_for_captum(problem)
    x = problem.x.clone().requires_grad_()
    method = attr.Saliency(forward)
    return lambda: method.attribute(x, abs=False, additional_forward_args=others)


def _captum_path(problem: ActorProblem) -> Run:
    from captum import attr

    forward, others = _forward_for_captum(problem)
    method = attr.IntegratedGradients(forward)
    return lambda: method.attribute(
        problem.x,
        baselines=problem.baseline,
        n_steps=STEPS,
        method="gausslegendre",
        additional_forward_args=others,
    )


def main(pairs: int, only: str, output: Path | None) -> None:
    torch.set_num_threads(1)
    found = [figure.as_dict() for figure in show(figures(pairs, only))]
    if output is not None:
        output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", default="", help="a part of a row's name, such as 'Saliency Categorical'")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    main(**vars(parser.parse_args()))
