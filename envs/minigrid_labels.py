"""MiniGrid in TorchRL, with concepts computed from the unwrapped environment.

TorchRL has no conversion for MiniGrid's space of missions; it is registered when the first MiniGrid
environment is made, so that importing this module imports no MiniGrid.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import gymnasium
from torchrl.data import NonTensor
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.libs.gym import register_gym_spec_conversion

from tdhook_rl.envs.concepts import Concept
from tdhook_rl.envs.info_labels import add_computed_labels

#: The labels under ``("concept", name)``.
MINIGRID_CONCEPTS = {
    "has_key": Concept("needed", "the agent carries a key", classes=2),
    "door_open": Concept("needed", "some door is open", classes=2),
    "distance": Concept(
        "needed", "cells to the nearest goal, closed doors and movable objects ignored; -1 without a path"
    ),
    "column": Concept("needed", "of the agent, from the left", classes=256),
    "row": Concept("needed", "of the agent, from the top", classes=256),
    "direction": Concept("needed", "0 right, 1 down, 2 left, 3 up", classes=4),
}


def make_minigrid(name: str = "MiniGrid-DoorKey-5x5-v0", *, labels: bool = True, **options: Any) -> EnvBase:
    """A MiniGrid environment for TorchRL, one copy.

    Args:
        name: as ``gymnasium.make`` knows it.
        labels: whether the labels of :data:`MINIGRID_CONCEPTS` are computed.
        options: of ``gymnasium.make``.

    Returns:
        an environment with ``image`` (uint8, ``(7, 7, 3)``: cast it before gradients), ``direction`` and
        ``mission`` (a string, outside the tensors). After :func:`register_mission_space`, TorchRL's ``GymEnv(name)``
        does the same without labels.

    Raises:
        ImportError: without the extra ``minigrid``.

    Example:
        >>> sorted(MINIGRID_CONCEPTS)
        ['column', 'direction', 'distance', 'door_open', 'has_key', 'row']
    """
    register_mission_space()
    env = gymnasium.make(name, **options)
    if not labels:
        return GymWrapper(env)
    functions = {
        "has_key": lambda grid: int(grid.carrying is not None and grid.carrying.type == "key"),
        "door_open": lambda grid: int(any(thing.type == "door" and thing.is_open for thing in _things(grid))),
        "distance": _distance,
        "column": lambda grid: int(grid.agent_pos[0]),
        "row": lambda grid: int(grid.agent_pos[1]),
        "direction": lambda grid: int(grid.agent_dir),
    }
    return add_computed_labels(env, functions, MINIGRID_CONCEPTS)


def register_mission_space() -> None:
    """Let TorchRL convert MiniGrid's missions: strings that travel beside the tensors.

    Raises:
        ImportError: without the extra ``minigrid``.
    """
    try:
        from minigrid.core.mission import MissionSpace
    except ImportError as error:
        there = getattr(sys.modules.get("minigrid"), "__file__", None)
        if there is not None:  # such as a script of that name
            raise ImportError(f"{there} is imported as minigrid, and is not MiniGrid: rename it ({error})") from None
        raise ImportError("MiniGrid is not installed: pip install 'tdhook_rl[minigrid]'") from None
    register_gym_spec_conversion(MissionSpace)(_missions)


def _missions(spec: Any, **options: Any) -> NonTensor:
    return NonTensor(shape=(), example_data="")


def _things(grid: Any) -> list[Any]:
    return [thing for thing in grid.grid.grid if thing is not None]


def _distance(grid: Any) -> float:
    """By breadth-first search; walls and lava block."""
    start = (int(grid.agent_pos[0]), int(grid.agent_pos[1]))
    steps, waiting = {start: 0}, deque([start])
    while waiting:
        here = waiting.popleft()
        thing = grid.grid.get(*here)
        if thing is not None and thing.type == "goal":
            return float(steps[here])
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            there = (here[0] + x, here[1] + y)
            if there in steps or not (0 <= there[0] < grid.width and 0 <= there[1] < grid.height):
                continue
            thing = grid.grid.get(*there)
            if thing is None or thing.type not in ("wall", "lava"):
                steps[there] = steps[here] + 1
                waiting.append(there)
    return -1.0
