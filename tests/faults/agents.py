"""The policy and the environment that faults are tried on."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl.envs import CueCorners

SITE = "module.0.module.0"


def actor(seed: int = 0) -> ProbabilisticActor:
    """A small policy for :func:`env`."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(90, 8), nn.Tanh(), nn.Linear(8, 4))
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]), in_keys=["logits"], distribution_class=Categorical,
        return_log_prob=True,
    )  # fmt: skip


def env() -> CueCorners:
    """Two environments."""
    return CueCorners(batch_size=[2], max_steps=5, seed=0)
