"""Layer-wise relevance propagation by the epsilon rule beside the same by hand (the floor), zennit and captum.

python -m benchmarks.relevance_speed --pairs 30

tdhook's rules give other numbers: ``python -m benchmarks.oracle_table`` has them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.attribution_speed import require_equal
from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.nets import CLASS, CLASSES, Problem, mlp
from benchmarks.pairs import measure, repetitions
from benchmarks.peers import Run, installed, zennit_composite
from tdhook_rl import targets
from tdhook_rl.attribution import LRP
from tdhook_rl.attribution.lrp_rules import Epsilon, Uniform

EPSILON = 1e-6
ZENNIT = "torchvision, which it imports and does not use here, may be a stand-in"


def convolutions(batch: int) -> Problem:
    """The network of DQN (Mnih et al. 2015)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, CLASSES)),
    )
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    x = torch.rand(batch, 4, 84, 84)
    return Problem("DQN's convolutions", net, x, torch.zeros_like(x))


PROBLEMS = (partial(mlp, 3, 64, 1), partial(mlp, 3, 64, 64), partial(mlp, 3, 64, 1024), partial(convolutions, 8))


def by_hand(problem: Problem) -> Tensor:
    """One pass by layers, and back: relevance over a layer's output, through its weights, times its input."""
    value, layers = problem.x, []
    for layer in problem.net:
        weighted = isinstance(layer, nn.Linear | nn.Conv2d)
        taken = value.detach().requires_grad_(weighted)
        value = layer(taken)
        layers.append((taken, value))
    relevance = torch.zeros_like(value)
    relevance[:, CLASS] = value.detach()[:, CLASS]
    for taken, value in reversed(layers):
        if taken.requires_grad:
            output = value.detach()
            shares = relevance / (output + torch.where(output >= 0, EPSILON, -EPSILON))
            relevance = taken.detach() * torch.autograd.grad(value, taken, shares)[0]
        else:
            relevance = relevance.reshape(taken.shape)
    return relevance


def contenders(problem: Problem, stack: ExitStack) -> dict[str, Run]:
    data = TensorDict({"input": problem.x}, batch_size=len(problem.x))
    made = LRP(target=targets.logit(CLASS, key="output"), rule_mapper=Uniform(Epsilon(EPSILON)))
    hooked = stack.enter_context(made.prepare(problem.net))
    runs: dict[str, Run] = {
        "hooked(td)": lambda: hooked(data)["attr", "input"],
        "floor": lambda: by_hand(problem),
    }
    if installed("zennit"):
        net = copy.deepcopy(problem.net)  # it places hooks on the module that it is given
        stack.enter_context(zennit_composite(EPSILON).context(net))

        def zennit() -> Tensor:
            x = problem.x.detach().requires_grad_()
            value = net(x)[:, CLASS]
            return torch.autograd.grad(value, x, value.detach())[0]

        runs["zennit"] = zennit
    if installed("captum") and not any(isinstance(layer, nn.Flatten) for layer in problem.net):
        from captum import attr
        from captum.attr._utils.lrp_rules import EpsilonRule

        theirs = copy.deepcopy(problem.net)
        for layer in theirs:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.rule = EpsilonRule(EPSILON)
        x = problem.x.clone().requires_grad_()
        runs["captum"] = partial(attr.LRP(theirs).attribute, x, target=CLASS)
    return runs


def figures(pairs: int = 30, within: float = float("inf")) -> Iterator[Figure]:
    """Measure network by network; every contender is checked to compute the same.

    Args:
        pairs: interleaved rounds.
        within: seconds that a row may take for more than five rounds.
    """
    for build in PROBLEMS:
        problem = build()
        with ExitStack() as stack:
            runs = contenders(problem, stack)
            require_equal(runs)
            seconds = measure(runs, pairs, max(repetitions(run) for run in runs.values()), within=within)
        left_out = "" if "captum" in runs else "captum has no rule for Flatten, or is not installed"
        budgets = [Budget("floor", note=left_out), Budget("zennit", note=ZENNIT), Budget("captum")]
        yield from figures_of("LRP, epsilon", f"{problem.name}, {len(problem.x)}", "hooked(td)", seconds, budgets)


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    show(figures(pairs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    main(**vars(parser.parse_args()))
