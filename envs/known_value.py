"""KnownValue: the value, its attribution and the advantage are known in closed form.

Sixteen features; the agent chooses one of two actions. The reward is ``0.5 x2 + x5 + (2a - 1) x9``. Features 2
and 11 drift (an autoregression with coefficient 0.8), the others are drawn anew at every step, and no action
changes any. So the value counts x2 more than the reward does, by 1 / (1 - gamma 0.8); the policy depends on
x9 alone; and x11, which drifts just as x2 does, matters for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.envs.concepts import EPISODE_COIN, Concept, state_variables
from tdhook_rl.envs.rendering import Canvas
from tdhook_rl.errors import InputError

FEATURES = 16
DRIFT, BONUS, CHOICE, DISTRACTOR = 2, 5, 9, 11
WEIGHTS = {DRIFT: 0.5, BONUS: 1.0}
RHO = 0.8
MEAN_ABS = math.sqrt(2 / math.pi)  # of a standard normal variable
LIMIT = 32.0  # |0.8 x + 0.6 e| stays below it for every normal number that torch draws
SIGNS = {"better_action": CHOICE, "drift_up": DRIFT, "bonus_up": BONUS, "unneeded_up": DISTRACTOR}


class KnownValue(ConceptEnv):
    """The environment, batched in torch. Episodes are only truncated, never terminated.

    Args:
        gamma: the discount of the closed forms and of the label ``value``.
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the features.
        device: where the tensors live.

    Keys:
        ``observation``: float, 16; ``features`` holds the same numbers as the state, so that a transform of the
        observation does not change the dynamics. Concepts: ``value`` (of the optimal policy), ``better_action``
        (x9 > 0), ``drift_up`` (x2 > 0) and ``bonus_up`` (x5 > 0) are needed; ``unneeded_up`` (x11 > 0) is not;
        ``episode_coin`` is seen nowhere.

    Example:
        >>> env = KnownValue()
        >>> states = env.state(features=torch.eye(16)[[2, 5, 9]])
        >>> env.value(states) - env.value(env.state(features=torch.zeros(16)))
        tensor([1.7857, 1.0000, 1.0000])
        >>> env.advantage(states, torch.zeros(3, dtype=torch.long))
        tensor([ 0.,  0., -2.])
    """

    gymnasium_id = "tdhook_rl/KnownValue-v0"
    n_actions = 2
    observation_features = FEATURES
    feature_names = tuple(
        {DRIFT: "drift", BONUS: "bonus", CHOICE: "choice", DISTRACTOR: "distractor"}.get(number, f"x{number}")
        for number in range(FEATURES)
    )
    concepts: ClassVar[Mapping[str, Concept]] = {
        "value": Concept("needed", "the value of the optimal policy"),
        "better_action": Concept("needed", "x9 > 0: action 1 is better", classes=2, moves=("features",)),
        "drift_up": Concept("needed", "x2 > 0, for value only", classes=2, moves=("features",), follows=("value",)),
        "bonus_up": Concept("needed", "x5 > 0, for value only", classes=2, moves=("features",), follows=("value",)),
        "unneeded_up": Concept("unneeded", "x11 > 0: it drifts but is not rewarded", classes=2, moves=("features",)),
        "episode_coin": EPISODE_COIN,
    }
    variables: ClassVar[Mapping[str, NestedKey]] = state_variables("episode_coin", free=("features",))
    defaults: ClassVar[Mapping[str, int]] = {"episode_coin": 0, "elapsed": 0}

    def __init__(
        self,
        *,
        gamma: float = 0.9,
        batch_size: Sequence[int] = (),
        max_steps: int = 100,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= gamma < 1:
            raise InputError(f"episodes do not terminate: gamma is at least 0 and below 1, got {gamma}")
        super().__init__(batch_size=batch_size, max_steps=max_steps, seed=seed, device=device)
        self.gamma = gamma

    # ------------------------------------------------------------------ what is known

    def gradient(self, states: TensorDictBase, *, gamma: float | None = None) -> Tensor:
        """Of the optimal value with respect to the observation: ``batch + (16,)``."""
        features = states["features"]
        slope = torch.zeros_like(features)
        slope[..., DRIFT] = WEIGHTS[DRIFT] / (1 - (self.gamma if gamma is None else gamma) * RHO)
        slope[..., BONUS] = WEIGHTS[BONUS]
        slope[..., CHOICE] = features[..., CHOICE].sign()
        return slope

    def attribution(
        self, states: TensorDictBase, *, baseline: float | Tensor = 0.0, gamma: float | None = None
    ) -> Tensor:
        """Integrated gradients of the optimal value from a baseline: ``batch + (16,)``.

        The value is a sum of functions of single features, so that each one's share is the change of its own.
        """
        features = states["features"]
        start = torch.as_tensor(baseline, dtype=features.dtype, device=features.device).expand_as(features)
        share = self.gradient(states, gamma=gamma) * (features - start)
        share[..., CHOICE] = features[..., CHOICE].abs() - start[..., CHOICE].abs()
        return share

    def action_values(self, states: TensorDictBase, *, gamma: float | None = None) -> Tensor:
        """Of each action, then optimal play: ``batch + (2,)``, the expectation over the next features."""
        choice = states["features"][..., CHOICE]
        without = self.value(states, gamma=gamma) - choice.abs()
        return torch.stack([without - choice, without + choice], -1)

    # ------------------------------------------------------------------ the hooks of ConceptEnv

    def _observation_spec(self, shape: torch.Size) -> TensorSpec:
        return Bounded(-LIMIT, LIMIT, shape=(*shape, FEATURES))

    def _variable_specs(self, shape: torch.Size) -> dict[str, TensorSpec]:
        return {"features": Bounded(-LIMIT, LIMIT, shape=(*shape, FEATURES))}

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        random = {"generator": self._generator, "device": self.device}
        return {
            "features": torch.randn(*shape, FEATURES, **random),
            "episode_coin": torch.randint(0, 2, shape, **random),
        }

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        return at["features"].clone()

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signs = {name: (at["features"][..., feature] > 0).long() for name, feature in SIGNS.items()}
        return {"value": self._value(at, self.gamma), **signs}

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        features = at["features"]
        reward = (2 * action - 1) * features[..., CHOICE]
        for feature, weight in WEIGHTS.items():
            reward = reward + weight * features[..., feature]
        fresh = torch.randn(features.shape, generator=self._generator, device=self.device)
        for feature in (DRIFT, DISTRACTOR):
            fresh[..., feature] = RHO * features[..., feature] + math.sqrt(1 - RHO**2) * fresh[..., feature]
        return {"features": fresh.clamp_(-LIMIT, LIMIT)}, reward, torch.zeros_like(action, dtype=torch.bool)

    def _check(self, at: Mapping[str, Tensor]) -> None:
        if not bool((at["features"].abs() <= LIMIT).all()):
            raise InputError(f"features are numbers from -{LIMIT} to {LIMIT}")

    def _changeable(self, at: Mapping[str, Tensor], concept: str) -> Tensor:
        return at["features"][..., SIGNS[concept]] != 0 if concept in SIGNS else super()._changeable(at, concept)

    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        if concept not in SIGNS:
            return super()._changed(at, concept, index)
        features = at["features"].clone()
        features[..., SIGNS[concept]] *= -1
        return {"features": features}

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        features = at["features"]
        later = gamma / (1 - gamma) * MEAN_ABS
        drift = WEIGHTS[DRIFT] / (1 - gamma * RHO) * features[..., DRIFT]
        return drift + WEIGHTS[BONUS] * features[..., BONUS] + features[..., CHOICE].abs() + later

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        mask = torch.zeros(FEATURES, dtype=torch.bool, device=self.device)
        mask[[DRIFT, BONUS, CHOICE] if of == "value" else [CHOICE]] = True
        return mask

    def _draw(self, at: Mapping[str, Any]) -> np.ndarray:
        tile = 30
        canvas = Canvas(7, FEATURES, tile=tile)
        zero = 3 * tile
        colours = {DRIFT: "green", BONUS: "green", CHOICE: "blue", DISTRACTOR: "orange"}
        for feature, value in enumerate(at["features"]):
            height = round(max(-3.0, min(3.0, value)) * tile)
            left = feature * tile
            canvas.bar(zero, zero - height, left + 5, left + tile - 5, colours.get(feature, "grey"))
            canvas.text(6, feature, str(feature), colours.get(feature, "grey"), scale=3)
        canvas.bar(zero - 1, zero + 1, 0, FEATURES * tile, "ink")
        return canvas.pixels

    def describe_slowly(  # type: ignore[override]
        self, *, features: Sequence[float], episode_coin: int = 0, elapsed: int = 0
    ) -> dict[str, Any]:
        """The labels and the observation of one state; the value as a sum of expected rewards."""
        value, discount, drift = features[BONUS] + abs(features[CHOICE]), 1.0, features[DRIFT]
        while discount > 1e-12:
            value += discount * 0.5 * drift
            discount, drift = discount * self.gamma, 0.8 * drift
            value += discount * MEAN_ABS
        return {
            "value": value,
            "better_action": 1 if features[CHOICE] > 0 else 0,
            "drift_up": 1 if features[DRIFT] > 0 else 0,
            "bonus_up": 1 if features[BONUS] > 0 else 0,
            "unneeded_up": 1 if features[DISTRACTOR] > 0 else 0,
            "episode_coin": episode_coin,
            "observation": list(features),
        }
