"""CueCorners: a cue decides which of two corners pays; what the agent must know is known exactly.

A 5x5 grid with a goal in two opposite corners and a row of four lights above it. The agent is paid +1 in
corner A if exactly one of the first two lights is on and in corner B otherwise, and -1 in the wrong corner;
each step costs 0.02. The first two lights are relevant only together (their XOR); the last two are never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.envs.concepts import Concept, state_variables
from tdhook_rl.envs.grids import manhattan, moved, worth
from tdhook_rl.envs.lights import BITS, LitGrid, light_concepts, names_of_planes
from tdhook_rl.errors import InputError

SIDE = 5
CELLS = SIDE * SIDE
CORNERS = (0, CELLS - 1)  # A, B
STEP_COST = 0.02


class CueCorners(LitGrid):
    """The environment, batched in torch.

    The state travels in the TensorDict, so that a rollout can start from any state: reset with a TensorDict
    made by :meth:`state` and ``set_state=True``, or set ``auto_reset=False``.

    Args:
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the start states.
        device: where the tensors live; as in TorchRL, ``None`` leaves them on the default device and spares
            collectors a cast at every step.

    Keys:
        ``observation``: float, 90 = 3 planes (agent, goals, lights) x 6 rows x 5 columns; the lights are row 0
        of the third plane. ``("concept", "bits")``: the lights, ``(4,)``; ``("concept", "xor")``: of the first
        two; ``("concept", "unneeded_xor")``: of the last two; ``("concept", "paying_corner")``: 0 for A, 1 for
        B; ``("concept", "cell")``: where the agent is, 0 to 24. ``elapsed``: steps so far.

    Example:
        >>> env = CueCorners(batch_size=[3], seed=0)
        >>> data = env.rollout(5, break_when_any_done=False)
        >>> data["observation"].shape, data["concept", "bits"].shape
        (torch.Size([3, 5, 90]), torch.Size([3, 5, 4]))
    """

    gymnasium_id = "tdhook_rl/CueCorners-v0"
    side = SIDE
    planes = ("agent", "goals", "lights")
    grid = (SIDE + 1, SIDE)
    observation_features = 3 * (SIDE + 1) * SIDE
    feature_names = names_of_planes(SIDE, "agent", "goals")
    concepts: ClassVar[Mapping[str, Concept]] = {
        **light_concepts("paying_corner"),
        "paying_corner": Concept(
            "needed", "0 if corner A pays, 1 if B does", classes=2, moves=("bits",), follows=("bits", "xor")
        ),
        "cell": Concept("needed", "where the agent is", classes=CELLS),
    }
    variables: ClassVar[Mapping[str, NestedKey]] = state_variables("cell", "bits")

    # ------------------------------------------------------------------ states

    def all_states(self) -> TensorDict:
        """Every state in which the agent acts: 23 cells x 16 settings of the lights, batch (368,)."""
        free = torch.tensor([cell for cell in range(CELLS) if cell not in CORNERS])
        lights = torch.cartesian_prod(*[torch.tensor([0, 1])] * BITS)
        return self.state(cell=free.repeat_interleave(len(lights)), bits=lights.repeat(len(free), 1))

    def paired_states(self, bit: int = 0) -> tuple[TensorDict, TensorDict]:
        """Every state with the light off, and the same states with only that light on: batch (184,) each."""
        if not 0 <= bit < BITS:
            raise InputError(f"there are lights 0 to {BITS - 1}, got {bit}")
        states = self.all_states()
        off = states[states["concept", "bits"][:, bit] == 0]
        return off, self.flip(off, bit)

    def flip(self, states: TensorDictBase, bit: int = 0) -> TensorDict:
        """The same states with one light flipped, labels included."""
        return self.change(states, "bits", bit)

    # ------------------------------------------------------------------ the hooks of ConceptEnv

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        cell = torch.randint(1, CELLS - 1, shape, generator=self._generator, device=self.device)
        bits = torch.randint(0, 2, (*shape, BITS), generator=self._generator, device=self.device)
        return {"cell": cell, "bits": bits}

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        cell = at["cell"]
        planes = torch.zeros(*cell.shape, 3, (SIDE + 1) * SIDE, device=self.device)
        # Row 0 of each plane is the row of lights; the grid starts at row 1.
        planes[..., 0, :].scatter_(-1, (cell + SIDE).unsqueeze(-1), 1.0)
        planes[..., 1, SIDE + CORNERS[0]] = 1.0
        planes[..., 1, SIDE + CORNERS[1]] = 1.0
        planes[..., 2, :BITS] = at["bits"].float()
        return planes.flatten(-2)

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        xors = super()._label(at)
        return xors | {"paying_corner": 1 - xors["xor"]}

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        cell = moved(at["cell"], action, SIDE)
        in_a, in_b = cell == CORNERS[0], cell == CORNERS[1]
        pays_b = self._label(at)["paying_corner"] == 1
        right = torch.where(pays_b, in_b, in_a)
        wrong = torch.where(pays_b, in_a, in_b)
        return {"cell": cell}, right.float() - wrong.float() - STEP_COST, in_a | in_b

    def _check(self, at: Mapping[str, Tensor]) -> None:
        if bool(((at["cell"] == CORNERS[0]) | (at["cell"] == CORNERS[1])).any()):
            raise InputError(f"cells {CORNERS} are the goals, where an episode has ended")

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        corners = torch.tensor(CORNERS, device=self.device)
        return worth(manhattan(at["cell"], corners[self._label(at)["paying_corner"]], SIDE), gamma, STEP_COST)

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        planes = torch.zeros(3, SIDE + 1, SIDE, dtype=torch.bool, device=self.device)
        planes[0, 1:] = True
        planes[0, 1:].flatten()[list(CORNERS)] = False  # the agent is never seen on a goal
        planes[2, 0, :2] = True
        return planes.flatten()

    def _draw(self, at: Mapping[str, Any]) -> np.ndarray:
        return self._drawn(at, CORNERS)

    def describe_slowly(self, *, cell: int, bits: Sequence[int], elapsed: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """The labels and the observation of one state, by counting."""
        lit = [light for light, on in enumerate(bits) if on]
        first, last = len([x for x in lit if x < 2]), len([x for x in lit if x >= 2])
        observation = [0.0] * self.observation_features
        for ones in (5 + cell, 30 + 5, 30 + 5 + 24, *(60 + light for light in lit)):
            observation[ones] = 1.0
        return {
            "bits": list(bits),
            "xor": 1 if first == 1 else 0,
            "unneeded_xor": 1 if last == 1 else 0,
            "paying_corner": 0 if first == 1 else 1,
            "cell": cell,
            "observation": observation,
        }
