"""An agent for MiniGrid's DoorKey, taught in seconds by a planner; with the extra ``minigrid``.

It sees what MiniGrid shows, 7 x 7 cells before it and in its own cell what it carries, and nothing of what was before.

    python -m tdhook_rl.examples.minigrid
"""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_rl.envs.minigrid_labels import register_mission_space

LEFT, RIGHT, FORWARD, PICK_UP, _, TOGGLE, _ = range(7)
AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))
#: The layers of the actor after their activations.
LAYERS = ("module.0.module.2", "module.0.module.4")


class Cells(nn.Module):
    """Numbers of kinds, colours and states as floats."""

    def forward(self, image: Tensor) -> Tensor:
        return image.float().flatten(-3) / 5


def make_actor() -> ProbabilisticActor:
    """A categorical policy of the view alone: 147-128-64-7, ReLU."""
    net = nn.Sequential(Cells(), nn.Linear(147, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 7))
    module = TensorDictModule(net, in_keys=["image"], out_keys=["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)


def make_trained_actor(
    name: str = "MiniGrid-DoorKey-6x6-v0", *, episodes: int = 300, epochs: int = 15, seed: int = 0
) -> ProbabilisticActor:
    """An actor that imitates the planner, in states to which a planner that errs now and then comes.

    Raises:
        ImportError: without the extra ``minigrid``.
    """
    images, actions = _demonstrations(name, episodes, seed)
    torch.manual_seed(seed)
    actor = make_actor()
    net = actor[0].module
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), actions[rows]).backward()
            optimizer.step()
    return actor


def _demonstrations(name: str, episodes: int, seed: int) -> tuple[Tensor, Tensor]:
    register_mission_space()
    env = gymnasium.make(name)
    draws = torch.Generator().manual_seed(seed)
    images, actions = [], []
    for episode in range(episodes):
        seen, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            action = plan(env.unwrapped)
            images.append(torch.as_tensor(seen["image"]))
            actions.append(action)
            if torch.rand((), generator=draws) < 0.15:
                action = int(torch.randint(6, (), generator=draws))
            seen, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    env.close()
    return torch.stack(images), torch.tensor(actions)


def plan(grid: Any) -> int:
    """The next action on a shortest way to the key, with it to the door, and through it to the goal."""
    places = {(x, y): grid.grid.get(x, y) for x in range(grid.width) for y in range(grid.height)}
    where = {thing.type: place for place, thing in places.items() if thing is not None}
    if places[where["door"]].is_open:
        wanted, last = "goal", FORWARD
    else:
        wanted, last = ("door", TOGGLE) if grid.carrying is not None else ("key", PICK_UP)
    start = (int(grid.agent_pos[0]), int(grid.agent_pos[1]), int(grid.agent_dir))
    first: dict[tuple[int, int, int], int | None] = {start: None}
    waiting = deque([start])
    while waiting:
        x, y, way = state = waiting.popleft()
        before = (x + AHEAD[way][0], y + AHEAD[way][1])
        if before == where.get(wanted):
            return last if first[state] is None else first[state]  # type: ignore[return-value]
        following = [(LEFT, (x, y, (way - 1) % 4)), (RIGHT, (x, y, (way + 1) % 4))]
        thing = places[before]
        if thing is None or (thing.type == "door" and thing.is_open):
            following.append((FORWARD, (*before, way)))
        for action, state_after in following:
            if state_after not in first:
                first[state_after] = action if first[state] is None else first[state]
                waiting.append(state_after)
    return FORWARD


if __name__ == "__main__":
    from tdhook_rl.envs.minigrid_labels import make_minigrid

    env = make_minigrid("MiniGrid-DoorKey-6x6-v0")
    data = env.rollout(300, make_trained_actor(), break_when_any_done=False)
    ended = data["next", "done"].sum()
    print(f"{int((data['next', 'reward'] > 0).sum())} of {int(ended)} episodes reach the goal")
