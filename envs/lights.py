"""Grids under a row of four lights: the XOR of the first two says which of two goals pays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.envs.concepts import Concept
from tdhook_rl.envs.grids import WAYS
from tdhook_rl.envs.rendering import Canvas

BITS = 4


def light_concepts(*paying: str) -> dict[str, Concept]:
    """What the lights mean; ``paying`` are the concepts that follow from the first two."""
    return {
        "bits": Concept(
            ("needed", "needed", "unneeded", "unneeded"),
            "the lights",
            classes=2,
            size=BITS,
            moves=("bits",),
            follows=("xor", "unneeded_xor", *paying),
        ),
        "xor": Concept(
            "needed", "exactly one of the first two lights is on", classes=2, moves=("bits",), follows=("bits", *paying)
        ),
        "unneeded_xor": Concept(
            "unneeded", "exactly one of the last two lights is on", classes=2, moves=("bits",), follows=("bits",)
        ),
    }


def names_of_planes(side: int, *planes: str) -> tuple[str, ...]:
    """Names of the features of such a grid: ``"agent r1c0"`` is below the row of lights, at the left."""
    cells = [f"r{row}c{column}" for row in range(side + 1) for column in range(side)]
    names = [f"{plane} {cell}" for plane in (*planes, "lights") for cell in cells]
    start = len(names) - len(cells)
    return (*names[:start], *(f"light {number}" for number in range(BITS)), *names[start + BITS :])


class LitGrid(ConceptEnv):
    """Base of these grids. The lights are the first row of the last plane of the observation; goal A pays on XOR."""

    n_actions = 4
    action_names = WAYS
    side: ClassVar[int]

    @classmethod
    def light_features(cls) -> Tensor:
        """Where the four lights are in the observation, ``(4,)``."""
        return cls.observation_features - (cls.side + 1) * cls.side + torch.arange(BITS)

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bits = at["bits"]
        return {"xor": bits[..., 0] ^ bits[..., 1], "unneeded_xor": bits[..., 2] ^ bits[..., 3]}

    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        if "bits" not in self.concepts[concept].moves:
            return super()._changed(at, concept, index)
        light = index if index is not None else 2 if concept == "unneeded_xor" else 0
        bits = at["bits"].clone()
        bits[..., light] = 1 - bits[..., light]
        return {"bits": bits}

    def _drawn(self, at: Mapping[str, Any], goals: Iterable[int], tile: int = 36) -> np.ndarray:
        """The lights, the goals A and B, the one that pays in green, and the agent."""
        side = self.side
        canvas = Canvas(side + 1, side, tile=tile)
        for column in range(side):
            canvas.fill(0, column, "wall")
        for light, on in enumerate(at["bits"]):
            canvas.disc(0, light, "yellow" if on else "ink", radius=0.3)
            canvas.ring(0, light, "white" if light < 2 else "grey", radius=0.38)
        for cell in range(side * side):
            canvas.outline(cell // side + 1, cell % side)
        a_pays = at["bits"][0] != at["bits"][1]
        for goal, letter, pays in zip(goals, "AB", (a_pays, not a_pays), strict=True):
            canvas.fill(goal // side + 1, goal % side, "green" if pays else "red", inset=0.06)
            canvas.text(goal // side + 1, goal % side, letter, "white")
        canvas.disc(at["cell"] // side + 1, at["cell"] % side, "blue")
        return canvas.pixels
