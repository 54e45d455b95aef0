"""Sweeps on agents of Gymnasium: what one direction does to them, beside random ones of its length.

python -m benchmarks.steering_agents              CartPole-v1, by Q-learning
python -m benchmarks.steering_agents lander       LunarLander-v3, which imitates Gymnasium's heuristic (extra box2d)

Each direction is the mean activation of the second hidden layer where the body leans to the right, minus where it leans
to the left, over the states that the agent itself visits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import GymEnv, SerialEnv
from torchrl.modules import QValueActor

from benchmarks.small_dqn import train
from tdhook_rl.report.figures import dose_curve
from tdhook_rl.sweeps import SteeringVector, SweepResult, steering_sweep

ALPHAS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)


def cart_pole() -> nn.Module:
    agents, _, length = train(seeds=4, steps=30_000, replay_ratio=0.25)
    best = int(length.argmax())
    print(f"an agent whose episodes lasted {length[best]:.0f} steps of late")
    net = agents.actor(best).module[0].module
    return QValueActor(net, in_keys=["observation"], action_space="one-hot")


def lander() -> nn.Module:
    """Behavioural cloning of the heuristic controller, in its own states and then in those of the clone."""
    import gymnasium
    from gymnasium.envs.box2d.lunar_lander import heuristic

    env = gymnasium.make("LunarLander-v3")
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    seen, wanted = [], []
    for turn in range(3):
        for episode in range(40):
            state, done = env.reset(seed=100 * turn + episode)[0], False
            while not done:
                seen.append(torch.as_tensor(state))
                wanted.append(int(heuristic(env.unwrapped, state)))
                with torch.no_grad():
                    action = wanted[-1] if turn == 0 else int(net(seen[-1]).argmax())
                state, _, ended, cut, _ = env.step(action)
                done = ended or cut
        states, actions = torch.stack(seen), torch.tensor(wanted)
        for _ in range(1500):
            rows = torch.randint(len(states), (512,))
            adam.zero_grad()
            nn.functional.cross_entropy(net(states[rows]), actions[rows]).backward()
            adam.step()
    return QValueActor(net, in_keys=["observation"], action_space="one-hot")


def leans(feature: int) -> Callable[[TensorDictBase], Tensor]:
    return lambda rows: rows["observation"][..., feature] > 0


def sweep(name: str, actor: nn.Module, feature: int, path: str, position: int, max_steps: int) -> SweepResult:
    make = partial(GymEnv, name)
    visited = SerialEnv(8, make).rollout(400, actor, break_when_any_done=False)
    direction = SteeringVector.from_contrast(actor, path, visited, leans(feature))
    return steering_sweep(
        actor, make, direction, alphas=ALPHAS, controls=6, episodes=32, max_steps=max_steps,
        outcomes={
            "return": "return",
            "share of the time right of the middle": lambda data: (
                (data["next", "observation"][..., position] > 0) & data["mask"]
            ).sum(-1) / data["mask"].sum(-1),
        },
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent", nargs="?", default="cart_pole", choices=["cart_pole", "lander"])
    agent = parser.parse_args().agent
    torch.manual_seed(0)
    start = time.perf_counter()
    if agent == "cart_pole":
        found = sweep("CartPole-v1", cart_pole(), 2, "module.0.module.2", 0, 500)
    else:
        found = sweep("LunarLander-v3", lander(), 4, "module.0.module.2", 0, 600)
    print(found.table())
    print(f"{found.facts['layout']}, paired: {found.paired}, {time.perf_counter() - start:.0f} s")
    random = found.control_response("return")
    dose_curve(found.alphas(), found.response("return"), random=random, outcome="return").save(f"runs/{agent}.png")
