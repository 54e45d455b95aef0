"""CueGrid: the task of CueCorners where both goals move, so that no action is tied to a goal.

A 4x4 grid with two goals in random cells and a row of four lights above it. The agent is paid +1 at goal A
if exactly one of the first two lights is on and at goal B otherwise, and -1 at the wrong goal; each step
costs 0.02. What the lights mean can be decoded from a trained agent, yet the mean-difference vector that
steers agents in CueCorners does next to nothing here: the negative control of steering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.envs.concepts import EPISODE_COIN, Concept, state_variables
from tdhook_rl.envs.grids import between, manhattan, moved, one_hot, worth
from tdhook_rl.envs.lights import BITS, LitGrid, light_concepts, names_of_planes
from tdhook_rl.errors import InputError

SIDE = 4
CELLS = SIDE * SIDE
PLANE = (SIDE + 1) * SIDE
STEP_COST = 0.02
# Hewitt and Liang (2019): a label drawn once for each input type, here the pair of agent's cell and goal A's.
CONTROL = torch.randint(0, 2, (CELLS, CELLS), generator=torch.Generator().manual_seed(2019))


class CueGrid(LitGrid):
    """The environment, batched in torch.

    Args:
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the start states.
        device: where the tensors live.

    Keys:
        ``observation``: float, 80 = 4 planes (agent, goal A, goal B, lights) x 5 rows x 4 columns; the lights
        are row 0 of the fourth plane. Concepts as in CueCorners, and ``goal_a``, ``goal_b`` and
        ``paying_cell`` (cells, 0 to 15), ``paying_goal`` (0 for A), ``control_label`` (a random label for each
        pair of agent's cell and goal A's) and ``episode_coin`` (drawn for each episode, seen nowhere: what a
        probe finds of it is leakage).

    Example:
        >>> env = CueGrid(batch_size=[3], seed=0)
        >>> env.rollout(5, break_when_any_done=False)["concept", "paying_goal"].shape
        torch.Size([3, 5])
    """

    gymnasium_id = "tdhook_rl/CueGrid-v0"
    side = SIDE
    planes = ("agent", "goal A", "goal B", "lights")
    grid = (SIDE + 1, SIDE)
    observation_features = 4 * PLANE
    feature_names = names_of_planes(SIDE, "agent", "goal A", "goal B")
    concepts: ClassVar[Mapping[str, Concept]] = {
        **light_concepts("paying_goal", "paying_cell"),
        "paying_goal": Concept(
            "needed",
            "0 if goal A pays, 1 if B does",
            classes=2,
            moves=("bits",),
            follows=("bits", "xor", "paying_cell"),
        ),
        "paying_cell": Concept("needed", "where the goal is that pays", classes=CELLS),
        "cell": Concept("needed", "where the agent is", classes=CELLS),
        "goal_a": Concept("needed", "where goal A is", classes=CELLS),
        "goal_b": Concept("needed", "where goal B is", classes=CELLS),
        "control_label": Concept("control", "a fixed random label for each pair of cells", classes=2),
        "episode_coin": EPISODE_COIN,
    }
    variables: ClassVar[Mapping[str, NestedKey]] = state_variables("cell", "goal_a", "goal_b", "bits", "episode_coin")
    defaults: ClassVar[Mapping[str, int]] = {"episode_coin": 0, "elapsed": 0}

    # ------------------------------------------------------------------ the hooks of ConceptEnv

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        random = {"generator": self._generator, "device": self.device}
        cell, goal_a, goal_b = torch.rand(*shape, CELLS, **random).topk(3, -1).indices.unbind(-1)
        bits = torch.randint(0, 2, (*shape, BITS), **random)
        coin = torch.randint(0, 2, shape, **random)
        return {"cell": cell, "goal_a": goal_a, "goal_b": goal_b, "bits": bits, "episode_coin": coin}

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        planes = [one_hot(at[name] + SIDE, PLANE) for name in ("cell", "goal_a", "goal_b")]
        lights = torch.zeros_like(planes[0])
        lights[..., :BITS] = at["bits"].float()
        return torch.cat([*planes, lights], -1)

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        xors = super()._label(at)
        xor = xors["xor"]
        return xors | {
            "paying_goal": 1 - xor,
            "paying_cell": torch.where(xor == 1, at["goal_a"], at["goal_b"]),
            "control_label": CONTROL.to(xor.device)[at["cell"], at["goal_a"]],
        }

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        cell = moved(at["cell"], action, SIDE)
        ended = (cell == at["goal_a"]) | (cell == at["goal_b"])
        right = (cell == self._label(at)["paying_cell"]).float()
        return {"cell": cell}, right - (ended.float() - right) - STEP_COST, ended

    def _check(self, at: Mapping[str, Tensor]) -> None:
        if bool((at["goal_a"] == at["goal_b"]).any()):
            raise InputError("goal_a and goal_b are different cells")
        if bool(((at["cell"] == at["goal_a"]) | (at["cell"] == at["goal_b"])).any()):
            raise InputError("the agent is on a goal, where an episode has ended")

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        goal = self._label(at)["paying_cell"]
        wrong = at["goal_a"] + at["goal_b"] - goal
        # A wrong goal on the only shortest path costs a detour of two steps.
        detour = 2 * between(wrong, at["cell"], goal, SIDE)
        return worth(manhattan(at["cell"], goal, SIDE) + detour, gamma, STEP_COST)

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        planes = torch.zeros(4, SIDE + 1, SIDE, dtype=torch.bool, device=self.device)
        planes[:3, 1:] = True
        planes[3, 0, :2] = True
        return planes.flatten()

    def _draw(self, at: Mapping[str, Any]) -> np.ndarray:
        return self._drawn(at, (at["goal_a"], at["goal_b"]), tile=44)

    def describe_slowly(  # type: ignore[override]
        self, *, cell: int, goal_a: int, goal_b: int, bits: Sequence[int], episode_coin: int = 0, elapsed: int = 0
    ) -> dict[str, Any]:
        """The labels and the observation of one state, by counting."""
        lit = [light for light, on in enumerate(bits) if on]
        first, last = len([x for x in lit if x < 2]), len([x for x in lit if x >= 2])
        observation = [0.0] * self.observation_features
        for ones in (4 + cell, 24 + goal_a, 44 + goal_b, *(60 + light for light in lit)):
            observation[ones] = 1.0
        return {
            "bits": list(bits),
            "xor": 1 if first == 1 else 0,
            "unneeded_xor": 1 if last == 1 else 0,
            "paying_goal": 0 if first == 1 else 1,
            "paying_cell": goal_a if first == 1 else goal_b,
            "cell": cell,
            "goal_a": goal_a,
            "goal_b": goal_b,
            "control_label": CONTROL.tolist()[cell][goal_a],
            "episode_coin": episode_coin,
            "observation": observation,
        }
