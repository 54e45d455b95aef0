"""TMaze: a cue is seen once, at the start, and decides at the end; the smallest task that needs memory.

At step 0 the agent sees the cue and a second cue that never pays; then it walks down a corridor where only a
flickering light is seen, and at its end (after 8 steps) it chooses an arm: +1 if it is the cued one, -1
otherwise. Earlier actions have no effect. A policy without memory is right half of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.envs.concepts import EPISODE_COIN, Concept, state_variables
from tdhook_rl.envs.rendering import Canvas
from tdhook_rl.errors import InputError


class TMaze(ConceptEnv):
    """The environment, batched in torch.

    Recurrent policies need TorchRL's ``InitTracker`` around it, and a primer for their state.

    Args:
        distractor_steps: the length of the corridor; an episode has one step more.
        batch_size: how many copies are stepped at once; ``()`` for one.
        seed: of the cues and the light.
        device: where the tensors live.

    Keys:
        ``observation``: float, 7 = cue is A, cue is B, second cue is A, second cue is B (step 0 only), light is
        off, light is on, at the junction. Concepts: ``cue`` (0 for arm A) and ``junction`` are needed;
        ``unneeded_cue`` and ``light`` (of this step) are not; ``episode_coin`` is seen nowhere. The labels of
        the cues are there at every step, also when they are no longer seen. Actions: 0 for arm A, 1 for B.

    Example:
        >>> data = TMaze(batch_size=[2], seed=0).rollout(9, break_when_any_done=False)
        >>> data["observation"][:, 1:, :4].any(), data["next", "terminated"].squeeze(-1).nonzero()[:, 1]
        (tensor(False), tensor([8, 8]))
    """

    gymnasium_id = "tdhook_rl/TMaze-v0"
    n_actions = 2
    action_names = ("arm A", "arm B")
    drawn_with_time = True
    observation_features = 7
    feature_names = (
        "cue is A", "cue is B", "second cue is A", "second cue is B", "light is off", "light is on", "at the junction"
    )  # fmt: skip
    concepts: ClassVar[Mapping[str, Concept]] = {
        "cue": Concept("needed", "the arm that pays, 0 for A", classes=2, moves=("cue",)),
        "unneeded_cue": Concept("unneeded", "the second cue, which never pays", classes=2, moves=("unneeded_cue",)),
        "light": Concept("unneeded", "the light of this step", classes=2, moves=("light",)),
        "junction": Concept("needed", "this action chooses", classes=2),
        "episode_coin": EPISODE_COIN,
    }
    variables: ClassVar[Mapping[str, NestedKey]] = state_variables("cue", "unneeded_cue", "light", "episode_coin")
    defaults: ClassVar[Mapping[str, int]] = {"unneeded_cue": 0, "light": 0, "episode_coin": 0, "elapsed": 0}
    relevance_of: ClassVar[tuple[str, ...]] = ("policy",)  # the optimal value depends on the time alone

    def __init__(
        self,
        *,
        distractor_steps: int = 8,
        batch_size: Sequence[int] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if distractor_steps < 1:
            raise InputError(f"distractor_steps must be at least 1, got {distractor_steps}")
        self.distractor_steps = distractor_steps
        super().__init__(batch_size=batch_size, max_steps=distractor_steps + 1, seed=seed, device=device)

    # ------------------------------------------------------------------ the hooks of ConceptEnv

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        drawn = torch.randint(0, 2, (*shape, 4), generator=self._generator, device=self.device)
        return dict(zip(("cue", "unneeded_cue", "light", "episode_coin"), drawn.unbind(-1), strict=True))

    def _sample(self, shape: torch.Size) -> dict[str, Tensor]:
        elapsed = torch.randint(0, self.max_steps, shape, generator=self._generator, device=self.device)
        return self._begin(shape) | {"elapsed": elapsed}

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        start = at["elapsed"] == 0
        seen = [start & (at[name] == arm) for name in ("cue", "unneeded_cue") for arm in (0, 1)]
        seen += [at["light"] == 0, at["light"] == 1, at["elapsed"] == self.distractor_steps]
        return torch.stack(seen, -1).float()

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"junction": (at["elapsed"] == self.distractor_steps).long()}

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        light = torch.randint(0, 2, action.shape, generator=self._generator, device=self.device)
        chooses = at["elapsed"] == self.distractor_steps
        reward = torch.where(action == at["cue"], 1.0, -1.0) * chooses
        return {"light": light}, reward, chooses

    def _check(self, at: Mapping[str, Tensor]) -> None:
        if bool((at["elapsed"] > self.distractor_steps).any()):
            raise InputError(
                f"the agent chooses at step {self.distractor_steps}, got elapsed {int(at['elapsed'].max())}"
            )

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        return gamma ** (self.distractor_steps - at["elapsed"]).float()

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        """What the choice at the end depends on: the cue at step 0."""
        return torch.tensor([True, True, *[False] * 5], device=self.device)

    def _draw(self, at: Mapping[str, Any]) -> np.ndarray:
        steps = self.distractor_steps
        canvas = Canvas(4, steps + 1, tile=36, colour="wall")
        for column in range(steps + 1):
            canvas.fill(1, column, "ground")
            canvas.outline(1, column)
        for row, arm in ((0, 0), (2, 1)):
            canvas.fill(row, steps, "green" if at["cue"] == arm else "red")
            canvas.text(row, steps, "AB"[arm], "white")
        # The cues stand at the start; once they are out of sight they are grey.
        shown = at["elapsed"] == 0
        canvas.text(0, 0, "AB"[at["cue"]], "yellow" if shown else "grey")
        canvas.text(2, 0, "AB"[at["unneeded_cue"]], "pink" if shown else "grey")
        place = min(at["elapsed"], steps)
        canvas.disc(1, place, "blue")
        for column in range(steps + 1):
            canvas.fill(3, column, "white")
        canvas.ring(3, place, "wall", radius=0.36)
        canvas.disc(3, place, "yellow" if at["light"] else "ink", radius=0.28)
        return canvas.pixels

    def describe_slowly(  # type: ignore[override]
        self, *, cue: int, unneeded_cue: int = 0, light: int = 0, episode_coin: int = 0, elapsed: int = 0
    ) -> dict[str, Any]:
        """The labels and the observation of one state, case by case."""
        observation = [0.0] * 7
        if elapsed == 0:
            observation[1 if cue else 0] = 1.0
            observation[3 if unneeded_cue else 2] = 1.0
        observation[5 if light else 4] = 1.0
        if elapsed == self.distractor_steps:
            observation[6] = 1.0
        return {
            "cue": cue,
            "unneeded_cue": unneeded_cue,
            "light": light,
            "junction": int(observation[6]),
            "episode_coin": episode_coin,
            "observation": observation,
        }
