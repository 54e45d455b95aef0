"""KeyDoor: fetch the key, open the door, reach the goal; seen as pixels.

Two rooms in a 6x6 grid with a wall between them. The key is picked up by stepping on it; walking into the
closed door with the key opens it. The goal pays +1 and ends the episode, each step costs 0.02. The floor has
one of two colours, which the task does not need although it is most of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.envs.concepts import EPISODE_COIN, Concept, state_variables
from tdhook_rl.envs.grids import WAYS, manhattan, moved, worth
from tdhook_rl.envs.rendering import COLOURS, Canvas
from tdhook_rl.errors import InputError

SIDE = 6
CELLS = SIDE * SIDE
WALL = 3  # the column between the rooms
TILE = 6  # pixels
STEP_COST = 0.02
AHEAD = ("subgoal", "distance")
FLOORS = ((225, 225, 215), (190, 205, 225))
# Tiles of the picture: each of the first five on both floors, then the wall and the door.
EMPTY, KEY, GOAL, AGENT, CARRIER = range(5)
BRICKS, CLOSED, OPEN, PASSING = range(10, 14)


class KeyDoor(ConceptEnv):
    """The environment, batched in torch.

    Args:
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the start states.
        device: where the tensors live.

    Keys:
        ``observation``: uint8, ``(3, 36, 36)``: red, green and blue of 6x6 tiles of 6x6 pixels, channels first as
        torch convolutions read them. Concepts: ``has_key``, ``door_open``, ``subgoal`` (0 key, 1 door, 2 goal),
        ``distance`` (steps to the goal by way of the key and the door), ``cell``, ``key_cell``, ``door_row`` and
        ``goal_cell`` are needed; ``floor`` (its colour) is not; ``episode_coin`` is seen nowhere.

    Example:
        >>> env = KeyDoor()
        >>> states = env.state(cell=[0], key_cell=[12], door_row=[2], goal_cell=[17], floor=[0])
        >>> states["observation"].shape, states["concept", "distance"]
        (torch.Size([1, 3, 36, 36]), tensor([8.]))
    """

    gymnasium_id = "tdhook_rl/KeyDoor-v0"
    n_actions = 4
    action_names = WAYS
    concepts: ClassVar[Mapping[str, Concept]] = {
        "has_key": Concept("needed", "the agent holds the key", classes=2, moves=("has_key",), follows=AHEAD),
        "door_open": Concept("needed", "the door is open", classes=2, moves=("door_open",), follows=AHEAD),
        "subgoal": Concept("needed", "what comes next: key, door or goal", classes=3),
        "distance": Concept("needed", "steps to the goal, those for key and door included"),
        "cell": Concept("needed", "where the agent is", classes=CELLS),
        "key_cell": Concept("needed", "where the key is or was", classes=CELLS),
        "door_row": Concept("needed", "the row of the door", classes=SIDE),
        "goal_cell": Concept("needed", "where the goal is", classes=CELLS),
        "floor": Concept("unneeded", "the colour of the floor", classes=2, moves=("floor",)),
        "episode_coin": EPISODE_COIN,
    }
    variables: ClassVar[Mapping[str, NestedKey]] = state_variables(
        "cell", "key_cell", "door_row", "goal_cell", "has_key", "door_open", "floor", "episode_coin"
    )
    defaults: ClassVar[Mapping[str, int]] = {"has_key": 0, "door_open": 0, "floor": 0, "episode_coin": 0, "elapsed": 0}

    def __init__(
        self,
        *,
        batch_size: Sequence[int] = (),
        max_steps: int = 60,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, max_steps=max_steps, seed=seed, device=device)
        self._sprites = _sprites().to(self._generator.device)

    # ------------------------------------------------------------------ the hooks of ConceptEnv

    def _observation_spec(self, shape: torch.Size) -> TensorSpec:
        return Bounded(0, 255, shape=(*shape, 3, SIDE * TILE, SIDE * TILE), dtype=torch.uint8)

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        random = {"generator": self._generator, "device": self.device}
        left = torch.rand(*shape, SIDE * WALL, **random).topk(2, -1).indices
        cell, key = (left // WALL * SIDE + left % WALL).unbind(-1)
        right = torch.randint(0, SIDE * (SIDE - WALL - 1), shape, **random)
        coins = torch.randint(0, 2, (*shape, 2), **random)
        return {
            "cell": cell,
            "key_cell": key,
            "door_row": torch.randint(0, SIDE, shape, **random),
            "goal_cell": right // (SIDE - WALL - 1) * SIDE + WALL + 1 + right % (SIDE - WALL - 1),
            "has_key": torch.zeros_like(cell),
            "door_open": torch.zeros_like(cell),
            "floor": coins[..., 0],
            "episode_coin": coins[..., 1],
        }

    def _sample(self, shape: torch.Size) -> dict[str, Tensor]:
        # All three stages, which start states lack.
        at = self._begin(shape)
        stage = torch.randint(0, 3, shape, generator=self._generator, device=self.device)
        return at | {"has_key": (stage > 0).long(), "door_open": (stage > 1).long()}

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        floor, cell, door = 5 * at["floor"], at["cell"], self._door(at)
        tiles = (floor + EMPTY).unsqueeze(-1).expand(*cell.shape, CELLS).clone()
        tiles[..., WALL::SIDE] = BRICKS
        key = torch.where(at["has_key"] == 1, EMPTY, KEY) + floor
        agent = torch.where(at["has_key"] == 1, CARRIER, AGENT) + floor
        for place, tile in (
            (door, torch.where(at["door_open"] == 1, OPEN, CLOSED)),
            (at["key_cell"], key),
            (at["goal_cell"], floor + GOAL),
            (cell, torch.where(cell == door, PASSING, agent)),
        ):
            tiles.scatter_(-1, place.unsqueeze(-1), tile.unsqueeze(-1))
        pictures = self._sprites[tiles].unflatten(-4, (SIDE, SIDE))  # ... row, column, colour, y, x
        return pictures.movedim(-3, -5).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"subgoal": at["has_key"] + at["door_open"], "distance": self._steps(at).float()}

    def _steps(self, at: Mapping[str, Tensor]) -> Tensor:
        cell, key, goal, door = at["cell"], at["key_cell"], at["goal_cell"], self._door(at)
        through = manhattan(door, goal, SIDE) + (1 - at["door_open"])  # walking into the door costs a step
        to_door = torch.where(
            at["has_key"] == 1, manhattan(cell, door, SIDE), manhattan(cell, key, SIDE) + manhattan(key, door, SIDE)
        )
        return torch.where(cell % SIDE < WALL, to_door + through, manhattan(cell, goal, SIDE))

    def _door(self, at: Mapping[str, Tensor]) -> Tensor:
        return at["door_row"] * SIDE + WALL

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        target = moved(at["cell"], action, SIDE)
        at_door = target == self._door(at)
        blocked = (target % SIDE == WALL) & ~(at_door & (at["door_open"] == 1))
        opens = at_door & (at["has_key"] == 1)
        cell = torch.where(blocked, at["cell"], target)
        reached = cell == at["goal_cell"]
        after = {
            "cell": cell,
            "has_key": at["has_key"] | (cell == at["key_cell"]).long(),
            "door_open": at["door_open"] | opens.long(),
        }
        return after, reached.float() - STEP_COST, reached

    def _check(self, at: Mapping[str, Tensor]) -> None:
        column, in_door = at["cell"] % SIDE, at["cell"] == self._door(at)
        for wrong, message in (
            (at["key_cell"] % SIDE >= WALL, f"the key is left of column {WALL}"),
            (at["goal_cell"] % SIDE <= WALL, f"the goal is right of column {WALL}"),
            ((at["door_open"] == 1) & (at["has_key"] == 0), "an open door has been opened with the key"),
            ((column == WALL) & ~in_door, "the agent is in the wall"),
            ((column >= WALL) & (at["door_open"] == 0), "the agent is past a closed door"),
            ((at["cell"] == at["key_cell"]) & (at["has_key"] == 0), "the agent stands on the key but has not taken it"),
            (at["cell"] == at["goal_cell"], "the agent is on the goal, where an episode has ended"),
        ):
            if bool(wrong.any()):
                raise InputError(message)

    def _changeable(self, at: Mapping[str, Tensor], concept: str) -> Tensor:
        left, holds = at["cell"] % SIDE < WALL, at["has_key"] == 1
        if concept == "has_key":
            return left & (at["door_open"] == 0) & (at["cell"] != at["key_cell"])
        return left & holds if concept == "door_open" else super()._changeable(at, concept)

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        return worth(self._steps(at), gamma, STEP_COST)

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        """The tiles of the agent, the door, the goal, and of the key while it lies there."""
        if at is None:
            raise InputError("which pixels of KeyDoor are relevant depends on the state: relevance(of, states)")
        tiles = torch.zeros(*at["cell"].shape, CELLS, dtype=torch.bool, device=self.device)
        for place in (at["cell"], self._door(at), at["goal_cell"]):
            tiles.scatter_(-1, place.unsqueeze(-1), True)
        tiles |= (torch.arange(CELLS, device=self.device) == at["key_cell"].unsqueeze(-1)) & (
            at["has_key"] == 0
        ).unsqueeze(-1)
        pixels = tiles.unflatten(-1, (SIDE, SIDE)).repeat_interleave(TILE, -1).repeat_interleave(TILE, -2)
        return pixels.unsqueeze(-3).expand(*at["cell"].shape, 3, SIDE * TILE, SIDE * TILE)

    def _draw(self, at: Mapping[str, Any]) -> np.ndarray:
        canvas = Canvas(SIDE, SIDE, tile=48)
        for cell in range(CELLS):
            row, column = divmod(cell, SIDE)
            canvas.fill(row, column, "wall" if column == WALL else "sky" if at["floor"] else "ground")
            if column != WALL:
                canvas.outline(row, column)
        canvas.fill(at["door_row"], WALL, "orange", inset=0.04)
        if at["door_open"]:
            canvas.fill(at["door_row"], WALL, "white", inset=0.14)
        else:
            canvas.disc(at["door_row"], WALL, "ink", radius=0.12)
        canvas.fill(at["goal_cell"] // SIDE, at["goal_cell"] % SIDE, "green", inset=0.1)
        canvas.text(at["goal_cell"] // SIDE, at["goal_cell"] % SIDE, "G", "white")
        row, column = divmod(at["cell"], SIDE)
        canvas.disc(row, column, "blue", radius=0.42)
        if not at["has_key"]:
            row, column = divmod(at["key_cell"], SIDE)
        canvas.disc(row, column, "yellow", radius=0.26)
        canvas.text(row, column, "K", "ink", scale=3)
        return canvas.pixels

    def describe_slowly(  # type: ignore[override]
        self,
        *,
        cell: int,
        key_cell: int,
        door_row: int,
        goal_cell: int,
        has_key: int = 0,
        door_open: int = 0,
        floor: int = 0,
        episode_coin: int = 0,
        elapsed: int = 0,
    ) -> dict[str, Any]:
        """The labels of one state; the distance by searching over cells, key and door step by step."""
        seen = {(cell, has_key, door_open)}
        frontier, steps = list(seen), 0
        while not any(place == goal_cell for place, _, _ in frontier):
            following = []
            for place, key, door in frontier:
                row, column = divmod(place, 6)
                for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    if not (0 <= y < 6 and 0 <= x < 6) or (x == 3 and y != door_row):
                        continue
                    there, has, opened = 6 * y + x, key, door
                    if x == 3 and not door:
                        if not key:
                            continue
                        there, opened = place, 1
                    has = 1 if there == key_cell else has
                    if (there, has, opened) not in seen:
                        seen.add((there, has, opened))
                        following.append((there, has, opened))
            frontier, steps = following, steps + 1
        return {
            "has_key": has_key,
            "door_open": door_open,
            "subgoal": 0 if not has_key else 2 if door_open else 1,
            "distance": float(steps),
            "cell": cell,
            "key_cell": key_cell,
            "door_row": door_row,
            "goal_cell": goal_cell,
            "floor": floor,
            "episode_coin": episode_coin,
        }


def _sprites() -> Tensor:
    """The tiles, ``(14, 3, 6, 6)``: the middle 4x4 or 2x2 pixels coloured on a ground."""
    tiles = [
        (floor, middle, core)
        for floor in FLOORS
        for middle, core in (
            (floor, floor),
            (floor, COLOURS["yellow"]),
            (COLOURS["green"], COLOURS["green"]),
            (COLOURS["blue"], COLOURS["blue"]),
            (COLOURS["blue"], COLOURS["yellow"]),
        )
    ]
    orange, wall, white = COLOURS["orange"], COLOURS["wall"], COLOURS["white"]
    tiles += [(wall, wall, wall), (orange, orange, wall), (orange, white, white)]
    tiles += [(orange, COLOURS["blue"], COLOURS["yellow"])]
    sprites = torch.empty(len(tiles), 3, TILE, TILE, dtype=torch.uint8)
    for sprite, rings in zip(sprites, tiles, strict=True):
        for margin, colour in enumerate(rings):
            inner = slice(margin, TILE - margin)
            sprite[:, inner, inner] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return sprites
