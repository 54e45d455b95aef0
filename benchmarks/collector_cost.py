"""What each method costs in a collector: plain, written by hand to output the same tensors, hooked, and tdhook.

python -m benchmarks.collector_cost --pairs 30
python -m benchmarks.collector_cost --nets mlp --envs 8 128 --methods caching --workers 2
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torchrl
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.modules import ProbabilisticActor

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from tdhook_rl import ActivationCaching, LinearProbe, ProbeReadout, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.method import Method

PLANES, ACTIONS, WIDTH = (3, 6, 5), 4, 64
STEPS = {1: 64, 8: 32, 128: 16}
#: Which entries of each net are the two sites, and the one that is steered and probed.
SITES = {"mlp": (1, 3), "conv": (2, 6)}
METHODS = ("caching", "steering", "probe readout", "saliency per step", "saliency per batch")
PLAIN, BY_HAND = "plain", "by hand"


def make_net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "mlp":
        widths = (CueCorners.observation_features, WIDTH, WIDTH, WIDTH)
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(WIDTH, ACTIONS))
    return nn.Sequential(
        nn.Unflatten(-1, PLANES),
        nn.Conv2d(PLANES[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(-3),
        nn.Linear(16 * PLANES[1] * PLANES[2], WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, ACTIONS),
    )


def make_actor(net: nn.Module, out_keys: list[Any]) -> ProbabilisticActor:
    module = TensorDictModule(net, in_keys=["observation"], out_keys=out_keys)
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


class ByHand(nn.Module):
    """A net that returns some of its activations, or reads or changes one, written into its forward."""

    def __init__(self, net: nn.Sequential, kind: str, method: str) -> None:
        super().__init__()
        self.net = net
        self.first, self.second = SITES[kind]
        self.method = method
        self.register_buffer("vector", torch.full((WIDTH,), 0.1))
        self.register_buffer("alpha", torch.tensor(1.0))
        self.probe = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        first = self.net[: self.first + 1](x)
        second = self.net[self.first + 1 : self.second + 1](first)
        if self.method == "steering":
            return self.net[self.second + 1 :](second + self.alpha * self.vector)
        logits = self.net[self.second + 1 :](second)
        if self.method == "caching":
            return logits, first, second
        return logits, self.probe(second).softmax(-1)


class SaliencyByHand(nn.Module):
    """The gradient of the taken action's log-probability, in a second pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = self.net(x).log_softmax(-1).gather(-1, action[..., None])
            return torch.autograd.grad(chosen.sum(), x)[0]


def annotate_by_hand(net: nn.Module, data: TensorDictBase) -> TensorDictBase:
    flat = data.reshape(-1)
    gradient = SaliencyByHand(net)(flat["observation"], flat["action"])
    return data.set(("attr", "observation"), gradient.reshape(data["observation"].shape))


@dataclass(frozen=True)
class Contender:
    """A policy, and what is done with each batch."""

    policy: nn.Module
    postproc: Callable[[TensorDictBase], TensorDictBase] | None = None


def by_hand(net: nn.Sequential, kind: str, method: str) -> Contender:
    if method == "saliency per batch":
        return Contender(make_actor(net, ["logits"]), partial(annotate_by_hand, net))
    if method == "saliency per step":
        saliency = TensorDictModule(
            SaliencyByHand(net), in_keys=["observation", "action"], out_keys=[("attr", "observation")]
        )
        return Contender(TensorDictSequential(make_actor(net, ["logits"]), saliency))
    keys = {
        "caching": ["logits", *(("cache", f"module.0.module.{site}") for site in SITES[kind])],
        "steering": ["logits"],
        "probe readout": ["logits", ("probe", "concept")],
    }
    return Contender(make_actor(ByHand(net, kind, method), keys[method]))


def method_of(kind: str, method: str) -> Method:
    first, second = (f"module.0.module.{site}" for site in SITES[kind])
    probe = LinearProbe(weight=torch.randn(2, WIDTH), bias=torch.zeros(2), path=second)
    return {
        "caching": lambda: ActivationCaching([first, second]),
        "steering": lambda: SteeringVectors({second: torch.full((WIDTH,), 0.1)}),
        "probe readout": lambda: ProbeReadout({"concept": probe}),
        "saliency per step": lambda: Saliency(target=targets.taken_action_log_prob(), when="step"),
        "saliency per batch": lambda: Saliency(target=targets.taken_action_log_prob(), when="batch"),
    }[method]()


def hooked(net: nn.Module, kind: str, method: str, stack: ExitStack) -> Contender:
    policy = stack.enter_context(method_of(kind, method).prepare(make_actor(net, ["logits"])))
    return Contender(policy, policy.annotate if method == "saliency per batch" else None)


def tdhook(net: nn.Module, kind: str, method: str, stack: ExitStack) -> Contender | str:
    """tdhook 0.3.0 on the same work, or why not."""
    if find_spec("tdhook") is None:
        return "not installed"
    from tdhook.attribution import Saliency as TdhookSaliency
    from tdhook.latent import ActivationCaching as TdhookCaching
    from tdhook.latent import SteeringVectors as TdhookSteering

    site = f"module[0].module[{SITES[kind][1]}]"
    actor = make_actor(net, ["logits"])
    if method == "caching":
        pattern = "|".join(rf"module\.0\.module\.{site}$" for site in SITES[kind])
        return Contender(stack.enter_context(TdhookCaching(pattern).prepare(actor)))
    if method == "steering":
        vector = torch.full((WIDTH,), 0.1)
        steer = TdhookSteering(modules_to_steer=[site], steer_fn=lambda module_key, output: output + vector)
        return Contender(stack.enter_context(steer.prepare(actor)))
    if method == "probe readout":
        return "has no inline probe"
    saliency = TdhookSaliency(init_attr_targets=_log_prob, additional_init_keys=["taken"])
    prepared = stack.enter_context(saliency.prepare(actor))
    if method == "saliency per step":
        return Contender(prepared)

    def annotate(data: TensorDictBase) -> TensorDictBase:
        found = prepared(data.select("observation").set("taken", data["action"]))
        return data.set(("attr", "observation"), found["attr", "observation"])

    return Contender(actor, annotate)


def _log_prob(found: TensorDictBase, additional: TensorDictBase) -> TensorDict:
    chosen = found["logits"].log_softmax(-1).gather(-1, additional["taken"][..., None]).squeeze(-1)
    return TensorDict(out=chosen, batch_size=found.batch_size)


def batches(contender: Contender, envs: int, workers: int, stack: ExitStack) -> Iterator[TensorDictBase]:
    options = {"policy": contender.policy, "postproc": contender.postproc, "total_frames": -1}
    if not workers:
        collector = Collector(
            CueCorners(batch_size=[envs], seed=0),
            frames_per_batch=envs * STEPS[envs],
            auto_register_policy_transforms=False,
            **options,
        )
    else:
        make = partial(CueCorners, batch_size=[envs], seed=0)
        collector = MultiSyncCollector([make] * workers, frames_per_batch=envs * STEPS[envs] * workers, **options)
    stack.callback(collector.shutdown)
    return iter(collector)


def measured(
    kind: str, envs: int, method: str, workers: int, pairs: int, within: float
) -> tuple[dict[str, np.ndarray], str]:
    """Seconds of each contender for one batch, and why tdhook does not run where it does not."""
    net = make_net(kind)
    refused = ""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {
            PLAIN: Contender(make_actor(net, ["logits"])),
            BY_HAND: by_hand(net, kind, method),
            "hooked": hooked(net, kind, method, stack),
        }
        runs = {name: batches(contender, envs, workers, stack).__next__ for name, contender in contenders.items()}
        try:
            peer = tdhook(net, kind, method, stack)
            if isinstance(peer, str):
                refused = peer
            else:
                run = batches(peer, envs, workers, stack).__next__
                run()
                runs["tdhook"] = run
        except Exception as error:  # whatever it fails with is the result
            refused = f"fails with {type(error).__name__}"
        return measure(runs, pairs, clock="wall" if workers else "cpu", within=within), refused


def figures(
    pairs: int = 30,
    nets: Sequence[str] = ("mlp", "conv"),
    envs: Sequence[int] = (1, 8, 128),
    methods: Sequence[str] = METHODS,
    workers: Sequence[int] = (2,),
    within: float = float("inf"),
) -> Iterator[Figure]:
    """Measure each method at each network and number of environments, then with worker processes.

    Args:
        pairs: interleaved rounds.
        nets, envs, methods: which; ``envs`` are batched.
        workers: of ``MultiSyncCollector``, with 8 environments each.
        within: seconds that one measurement may take for more than five rounds.
    """
    cases = [(net, count, 0) for net in nets for count in envs] + [("mlp", 8, count) for count in workers]
    for net, count, processes in cases:
        for method in methods:
            seconds, refused = measured(net, count, method, processes, pairs, within)
            case = f"{net}, {count} env{'s' if count > 1 else ''}" + (f", {processes} workers" if processes else "")
            note = f"tdhook: {refused}" if refused else ""
            budgets = [*_budgets(net, count, method, note), Budget("tdhook")]
            yield from figures_of(method, case, "hooked", seconds, budgets)


def _budgets(net: str, envs: int, method: str, note: str) -> list[Budget]:
    """Frames per second may be so many of the other's: time at most one over that."""
    of_hand, of_plain = {"saliency per step": 0.95, "saliency per batch": 0.95 if net == "conv" else 0.0}, 0.0
    if method == "saliency per batch" and net == "mlp" and envs > 1:
        of_plain = 0.85
    share = of_hand.get(method, 0.97)
    return [
        Budget(BY_HAND, 1 / share if share else None, note),
        Budget(PLAIN, 1 / of_plain if of_plain else None),
    ]


def main(nets: list[str], envs: list[int], methods: list[str], workers: list[int], pairs: int) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    show(figures(pairs, nets, envs, methods, workers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=["mlp", "conv"], choices=("mlp", "conv"))
    parser.add_argument("--envs", nargs="*", type=int, default=[1, 8, 128], choices=STEPS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--workers", nargs="*", type=int, default=[2], help="worker counts of MultiSyncCollector")
    parser.add_argument("--pairs", type=int, default=30)
    main(**vars(parser.parse_args()))
