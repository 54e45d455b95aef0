"""Training an agent by its recipe: PPO with TorchRL's collector and losses, nothing of ours in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl.experiments.agents import Agent, Recipe

ENVS, EPOCHS = 128, 6

Progress = Callable[[str, int, int], None]


def untrained(recipe: Recipe, seed: int) -> Agent:
    """The agent of a seed before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.agent()


def train(
    recipe: Recipe, seed: int, progress: Progress = lambda *_: None
) -> tuple[Agent, dict[int, dict[str, Tensor]]]:
    """Train an agent; from one seed and one version of torch, always the same.

    Args:
        recipe: of the environment.
        seed: of the network, the environment and the order of rows.
        progress: called after each batch with what is done and how many of how many frames are through.

    Returns:
        the agent, and the weights of its actor after each of ``recipe.snapshots`` frames.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(recipe, seed, progress)


def _trained(recipe: Recipe, seed: int, progress: Progress) -> tuple[Agent, dict[int, dict[str, Tensor]]]:
    agent = recipe.agent()
    size = ENVS * recipe.steps
    loss = ClipPPOLoss(agent.actor, agent.critic, entropy_coeff=recipe.entropy, clip_epsilon=0.2)
    advantage = GAE(gamma=recipe.gamma, lmbda=recipe.lmbda, value_network=agent.critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=recipe.lr)
    batches = recipe.frames // size
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=batches)
    collector = Collector(
        recipe.env(batch_size=[ENVS], seed=seed),
        agent.actor,
        frames_per_batch=size,
        total_frames=batches * size,
        auto_register_policy_transforms=False,
    )
    snapshots: dict[int, dict[str, Tensor]] = {}
    frames = 0
    try:
        for data in collector:
            _update(recipe, loss, advantage, optimizer, data)
            schedule.step()
            frames += data.numel()
            if frames in recipe.snapshots:
                snapshots[frames] = {name: value.clone() for name, value in agent.actor.state_dict().items()}
            progress(f"training  mean reward {data['next', 'reward'].mean():.2f}", frames, recipe.frames)
    finally:
        collector.shutdown()
    return agent, snapshots


def _update(
    recipe: Recipe, loss: ClipPPOLoss, advantage: GAE, optimizer: torch.optim.Optimizer, data: TensorDictBase
) -> None:
    with torch.no_grad():
        data = advantage(data.copy())
    rows = data if recipe.recurrent else data.reshape(-1)
    share = recipe.minibatch // (recipe.steps if recipe.recurrent else 1)
    with set_recurrent_mode(True) if recipe.recurrent else nullcontext():
        for _ in range(EPOCHS):
            for index in torch.randperm(len(rows)).split(share):
                losses = loss(rows[index])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
