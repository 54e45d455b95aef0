"""What attribution patching of every unit at every site costs, beside the same written by hand for one network.

python -m benchmarks.causal_cost
python -m benchmarks.causal_cost --pairs 40

By hand: one forward pass on the clean states, one on the corrupt ones with its backward pass, plain hooks that keep the
activations, and slopes times differences. ``attribution_patching`` is called as users do: it hooks a copy of the policy
and checks the states, which takes as long for few states as for many (it is printed); the intervals of its table are
made when that is looked at. The same numbers are asked of both. Then how long it takes to measure each unit instead, by
patching it, and to find a circuit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from tdhook_rl import ActivationCaching
from tdhook_rl.sweeps import attribution_patching, find_circuit, patch_units

ALLOWED = 1.5
OURS, BY_HAND = "attribution_patching", "two passes by hand"


@dataclass(frozen=True)
class Case:
    """A network, the shape of what it sees, how many states, and the layers whose units are looked at."""

    layers: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    states: int
    sites: tuple[int, ...]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8)
    )


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Flatten(-3), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6),
    )  # fmt: skip


CASES = {
    "MLP 3 x 512, 2,048": Case(mlp, (64,), 2048, (1, 3, 5)),
    "MLP 3 x 512, 256": Case(mlp, (64,), 256, (1, 3, 5)),
    "DQN's convolutions, 256": Case(conv, (4, 84, 84), 256, (1, 3, 5, 8)),
    "DQN's convolutions, 64": Case(conv, (4, 84, 84), 64, (1, 3, 5, 8)),
}


def by_hand(net: nn.Sequential, sites: tuple[int, ...], clean: Tensor, corrupt: Tensor) -> list[Tensor]:
    """For each site ``(units, states)``."""
    kept: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            kept[place] = output

        return hook

    handles = [net[place].register_forward_hook(keep(place)) for place in sites]
    with torch.no_grad():
        there_logits = net(clean)
    there = dict(kept)
    here_logits = net(corrupt)
    scores = here_logits.log_softmax(-1)
    actions = [logits.argmax(-1, keepdim=True) for logits in (there_logits, here_logits)]
    value = (scores.gather(-1, actions[0]) - scores.gather(-1, actions[1])).sum()
    slopes = torch.autograd.grad(value, [kept[place] for place in sites])
    for handle in handles:
        handle.remove()
    products = [slope * (there[place] - kept[place].detach()) for slope, place in zip(slopes, sites, strict=True)]
    return [(one.flatten(2).sum(-1) if one.ndim > 2 else one).T for one in products]


def figures(pairs: int = 15, within: float = float("inf")) -> Iterator[Figure]:
    """Measure case by case; the numbers of both are checked to be equal.

    Args:
        pairs: how often each is run, in turn.
        within: seconds that a case may take for more than five rounds.
    """
    for name, case in CASES.items():
        torch.manual_seed(0)
        net = case.layers()
        module = TensorDictModule(net, ["observation"], ["logits"])
        policy = ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical)
        clean, corrupt = (torch.randn(case.states, *case.shape) for _ in range(2))
        data = [TensorDict({"observation": one}, case.states) for one in (clean, corrupt)]
        sites = [f"module.0.module.{place}" for place in case.sites]
        runs = {
            BY_HAND: partial(by_hand, net, case.sites, clean, corrupt),
            OURS: partial(attribution_patching, policy, *data, sites, compare=0, chunk_size=case.states),
            "to hook": lambda policy=policy, sites=sites: (
                ActivationCaching(sites).prepare(policy, return_context=False).restore()
            ),
        }
        estimates, expected = runs[OURS]().estimates, torch.cat(runs[BY_HAND]()).double()
        torch.testing.assert_close(estimates, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        seconds = measure(runs, pairs, within=within)
        hooking = f"{1e3 * float(np.median(seconds['to hook'])):.1f} ms of it to hook"
        yield from figures_of("every unit, every site", name, OURS, seconds, [Budget(BY_HAND, ALLOWED, hooking)])


def rest(case: Case) -> tuple[int, float, float]:
    """How many units there are, and the seconds of measuring each and of finding a circuit, in 64 states."""
    torch.manual_seed(0)
    policy = TensorDictModule(case.layers(), ["observation"], ["logits"])
    data = [TensorDict({"observation": torch.randn(64, *case.shape)}, 64) for _ in range(2)]
    sites = [f"module.{place}" for place in case.sites]

    def metric(outputs: TensorDict) -> Tensor:
        return outputs["logits"][:, 0]

    start = time.process_time()
    count = len(patch_units(policy, *data, sites, metric=metric))
    middle = time.process_time()
    find_circuit(policy, *data, sites, metric=metric, controls=8)
    return count, middle - start, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="how often each is run, in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("attribution patching of every unit of every site")
    show(figures(options.pairs))
    count, units, circuit = rest(CASES["MLP 3 x 512, 256"])
    print(f"64 states: each of {count} units measured in {units:.1f} s, a circuit among them found in {circuit:.1f} s")


if __name__ == "__main__":
    main()
