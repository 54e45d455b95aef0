"""Deep Q-learning of many seeds at once on cart-pole: small and all in torch, so that a claim takes minutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import QValueActor

ENVS, BATCH, WIDTH, GAMMA = 2, 32, 128, 0.99
OBSERVATION, ACTIONS = 4, 2
#: Steps of the environment of each seed from one copy of the target network to the next.
TARGET = 200


class CartPole:
    """The equations of Barto, Sutton & Anderson 1983, as in Gymnasium's ``CartPole-v1``: 500 steps at most."""

    def __init__(self, *shape: int) -> None:
        self.state = torch.empty(*shape, OBSERVATION).uniform_(-0.05, 0.05)
        self.steps = torch.zeros(shape, dtype=torch.long)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, and whether the pole has fallen; what has ended begins anew in :attr:`state`."""
        x, speed, angle, spin = self.state.unbind(-1)
        force = torch.where(action == 1, 10.0, -10.0)
        push = (force + 0.05 * spin.square() * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
        move = push - 0.05 * turn * angle.cos() / 1.1
        after = torch.stack([x + 0.02 * speed, speed + 0.02 * move, angle + 0.02 * spin, spin + 0.02 * turn], -1)
        fallen = (after[..., 0].abs() > 2.4) | (after[..., 2].abs() > 12 * math.pi / 180)
        self.steps += 1
        ended = fallen | (self.steps >= 500)
        self.steps[ended] = 0
        self.state = torch.where(ended[..., None], torch.empty_like(after).uniform_(-0.05, 0.05), after)
        return after, fallen


class Stack:
    """Two hidden layers of each seed, initialised as ``nn.Linear`` is."""

    def __init__(self, seeds: int, parameters: list[Tensor] | None = None) -> None:
        self.parameters: list[Tensor] = [] if parameters is None else parameters
        if parameters is not None:
            return
        for width, out in pairwise((OBSERVATION, WIDTH, WIDTH, ACTIONS)):
            for shape in ((seeds, width, out), (seeds, 1, out)):
                self.parameters.append(torch.empty(shape).uniform_(-(width**-0.5), width**-0.5).requires_grad_())

    def __call__(self, x: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
        """``(seeds, rows, actions)`` of ``(seeds, rows, observation)``."""
        first, one, second, two, third, three = parameters or self.parameters
        x = torch.baddbmm(one, x, first).relu()
        return torch.baddbmm(three, torch.baddbmm(two, x, second).relu(), third)

    def copied(self) -> list[Tensor]:
        return [one.detach().clone() for one in self.parameters]

    def actor(self, seed: int) -> QValueActor:
        """The policy of one seed, as TorchRL has it."""
        net = nn.Sequential(
            nn.Linear(OBSERVATION, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, ACTIONS)
        )
        with torch.no_grad():
            for layer, place in ((0, 0), (2, 2), (4, 4)):
                net[layer].weight.copy_(self.parameters[place][seed].T)
                net[layer].bias.copy_(self.parameters[place + 1][seed, 0])
        module = TensorDictModule(net, ["observation"], ["action_value"])
        return QValueActor(module, in_keys=["observation"], action_space="categorical")


def train(
    *,
    seeds: int,
    steps: int,
    replay_ratio: float,
    lr: float = 1e-3,
    seed: int = 0,
    watch: Callable[[Stack, Tensor, int, int], None] = lambda *_: None,
) -> tuple[Stack, Tensor, Tensor]:
    """Train.

    Args:
        seeds: how many agents.
        steps: of the environment, of each of them.
        replay_ratio: gradient steps for each step of the environment.
        lr: of Adam.
        seed: of everything.
        watch: called before each gradient step and after the last, with the agents, the states they have seen, how many
            gradient steps there were, and how many of them since the target network was copied.

    Returns:
        the agents, ``(seeds, rows, observation)`` of what they saw, and ``(seeds,)`` steps of an episode of late.
    """
    torch.manual_seed(seed)
    agents, env = Stack(seeds), CartPole(seeds, ENVS)
    optimiser = torch.optim.Adam(agents.parameters, lr=lr)
    target, since, done_updates, due = agents.copied(), 0, 0, 0.0
    seen, fallen = torch.zeros(seeds, steps, OBSERVATION), torch.zeros(seeds, steps)
    after, action = torch.zeros_like(seen), torch.zeros(seeds, steps, dtype=torch.long)
    every_seed, late = torch.arange(seeds)[:, None], torch.zeros(seeds)
    for at in range(0, steps, ENVS):
        explore = max(0.05, 1 - at / (0.3 * steps))
        rows = slice(at, at + ENVS)
        with torch.no_grad():
            greedy = agents(env.state).argmax(-1)
        chosen = torch.where(torch.rand(seeds, ENVS) < explore, torch.randint(ACTIONS, (seeds, ENVS)), greedy)
        seen[:, rows], action[:, rows] = env.state, chosen
        after[:, rows], ended = env.step(chosen)
        fallen[:, rows] = ended.float()
        if at >= 0.7 * steps:
            late += ended.float().sum(1)
        if at < 10 * BATCH:
            continue
        if at % TARGET == 0:
            target, since = agents.copied(), 0
        due += replay_ratio * ENVS
        while due >= 1:
            watch(agents, seen[:, : at + ENVS], done_updates, since)
            index = torch.randint(at + ENVS, (seeds, BATCH))
            with torch.no_grad():
                best = agents(after[every_seed, index], target).amax(-1)
                wanted = 1 + GAMMA * best * (1 - fallen[every_seed, index])
            value = agents(seen[every_seed, index]).gather(-1, action[every_seed, index][..., None])[..., 0]
            # The mean of each seed; the sum over seeds, which share nothing.
            loss = nn.functional.smooth_l1_loss(value, wanted, reduction="none").mean(1).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            due, done_updates, since = due - 1, done_updates + 1, since + 1
    watch(agents, seen, done_updates, since)
    return agents, seen, 0.3 * steps / late.clamp_min(1)
