"""What a hooked policy costs in a collector: plain, written by hand to output two activations, and hooked.

python -m benchmarks.collector_overhead --pairs 40
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor

from benchmarks.pairs import compare
from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners

ENVS, STEPS = 128, 16
SITES = ["module.0.module.1", "module.0.module.3"]


class ByHand(nn.Module):
    """The same net, which returns two activations beside the logits."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.net[1](self.net[0](observation))
        second = self.net[3](self.net[2](first))
        return self.net[6](self.net[5](self.net[4](second))), first, second


def make_net() -> nn.Sequential:
    widths = (CueCorners.observation_features, 64, 64, 64)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 4))


def make_actor(net: nn.Module, out_keys: list) -> ProbabilisticActor:
    module = TensorDictModule(net, in_keys=["observation"], out_keys=out_keys)
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def batches(policy: nn.Module):
    return iter(
        Collector(
            CueCorners(batch_size=[ENVS], seed=0),
            policy,
            frames_per_batch=ENVS * STEPS,
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
    )


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = make_net()
    plain = make_actor(net, ["logits"])
    by_hand = make_actor(ByHand(net), ["logits", *(("cache", site) for site in SITES)])
    with ActivationCaching(SITES).prepare(plain) as hooked:
        policies = {"plain": plain, "by hand": by_hand, "hooked": hooked}
        runs = {name: batches(policy).__next__ for name, policy in policies.items()}
        seconds, ratios = compare(runs, {"hooked": ["plain", "by hand"], "by hand": ["plain"]}, pairs=pairs)
    for name, value in seconds.items():
        print(f"{name:8} {ENVS * STEPS / value:9.0f} frames per CPU second")
    for ratio in ratios:
        print(ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    main(**vars(parser.parse_args()))
