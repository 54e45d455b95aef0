"""The same episodes, steered and not, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase

from tdhook_rl.attribution import Saliency
from tdhook_rl.errors import InputError, TdhookError
from tdhook_rl.latent import ControlRecord, SteeringVectors
from tdhook_rl.method import Compose
from tdhook_rl.report.player import Player, player
from tdhook_rl.rollout.alike import alike_episodes

#: Beside what is not steered.
MOST = 3


def steered_player(
    policy: nn.Module,
    env: EnvBase,
    vectors: Mapping[str, Any],
    alphas: Mapping[str, float],
    *,
    sign: Any = None,
    when: Any = None,
    episodes: int = 2,
    max_steps: int = 200,
    seed: int = 0,
    deterministic: bool = False,
    title: str = "The same episodes, steered and not",
) -> Player:
    """A player of episodes that are not steered beside the same under each vector, with saliencies where there are any.

    All begin alike and draw alike, and differ by the steering alone until the policy acts otherwise.

    Args:
        policy: the policy, not hooked.
        env: its environment.
        vectors: up to three by name, each as of :class:`~tdhook_rl.latent.SteeringVectors`.
        alphas: the strength of each.
        sign, when: as of :func:`tdhook_rl.sweeps.steering_sweep`.
        episodes: how many.
        max_steps: the longest an episode may last.
        seed: of the first start and its draws.
        deterministic: whether the likeliest action is taken rather than drawn.
        title: of the player.

    Raises:
        InputError: for no vector, or more than three.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> vectors = {"away": {FC2: torch.ones(64)}}
        >>> steered_player(make_actor(), CueCorners(), vectors, {"away": 2.0}, episodes=1, max_steps=4).title
        'The same episodes, steered and not'
    """
    if not 1 <= len(vectors) <= MOST:
        raise InputError(f"a player has 1 to {MOST} vectors beside what is not steered, got {len(vectors)}")
    options = {"episodes": episodes, "max_steps": max_steps, "seed": seed, "deterministic": deterministic}
    first = next(iter(vectors.values()))
    with _steered(policy, first, 0.0, when) as hooked:
        shown = {"not steered": alike_episodes(hooked, env, **options)}
    signs = _signs(sign, shown["not steered"])
    for name, vector in vectors.items():
        played = {}
        for one in dict.fromkeys(signs):
            with _steered(policy, vector, one * alphas[name], when) as hooked:
                played[one] = alike_episodes(hooked, env, **options)
        shown[f"{name}, alpha {alphas[name]:g}"] = [played[one][place] for place, one in enumerate(signs)]
    with _steered(policy, first, 0.0, when) as hooked:
        return player(shown, policy=hooked, env=env, title=title, name="steered")


def _signs(sign: Any, episodes: list[TensorDictBase]) -> list[float]:
    """Which way each episode is steered, as its start state says."""
    if sign is None:
        return [1.0] * len(episodes)
    return [float(one) for one in sign(torch.stack([one[0] for one in episodes])).reshape(-1)]


def _steered(policy: nn.Module, vector: Any, alpha: float, when: Any) -> Any:
    steering = SteeringVectors(vector, alpha=alpha, **({} if when is None else {"when": when}))
    methods = [steering, ControlRecord(["steering.alpha"])]
    try:
        with Compose(*methods, Saliency()).prepare(policy):
            methods.append(Saliency())
    except TdhookError:
        pass  # it has nothing that a saliency is of; what it does is seen all the same
    return Compose(*methods).prepare(policy)
