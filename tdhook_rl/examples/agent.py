"""The agent of the examples: a small actor and critic for CueCorners, and one PPO update."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl.envs import CueCorners

#: The second hidden layer of the actor, after its activation.
FC2 = "module.0.module.3"


def make_actor() -> ProbabilisticActor:
    """A categorical policy: 90-64-64-64-4, ReLU."""
    net = TensorDictModule(_mlp(CueCorners.n_actions), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def make_critic() -> ValueOperator:
    """A value network of the same shape."""
    return ValueOperator(_mlp(1), in_keys=["observation"])


class PPO:
    """Proximal policy optimisation with TorchRL's losses, on the plain actor and critic."""

    def __init__(self, actor: nn.Module, critic: nn.Module, *, epochs: int = 6, minibatch: int = 512) -> None:
        self.advantage = GAE(gamma=0.95, lmbda=0.95, value_network=critic)
        self.loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01, clip_epsilon=0.2)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-3)
        self.epochs = epochs
        self.minibatch = minibatch

    def update(self, batch: TensorDictBase) -> None:
        """Several epochs over one batch of the collector."""
        with torch.no_grad():
            batch = self.advantage(batch.copy())
        rows = batch.reshape(-1)
        for _ in range(self.epochs):
            for index in torch.randperm(len(rows)).split(self.minibatch):
                losses = self.loss(rows[index])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                self.optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
                self.optimizer.step()


def make_trained_actor(frames: int = 40_960, seed: int = 0) -> ProbabilisticActor:
    """An actor after a few seconds of training."""
    torch.manual_seed(seed)
    actor = make_actor()
    ppo = PPO(actor, make_critic())
    env = CueCorners(batch_size=[128], seed=seed)
    collector = Collector(env, actor, frames_per_batch=2048, total_frames=frames, auto_register_policy_transforms=False)
    for data in collector:
        ppo.update(data)
    collector.shutdown()
    return actor


def _mlp(outputs: int) -> nn.Sequential:
    widths = (CueCorners.observation_features, 64, 64, 64)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, outputs))
