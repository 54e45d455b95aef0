"""Observations as ``VecNormalize`` of Stable-Baselines3 normalises them, by its statistics of now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.errors import InputError


class Statistics:
    """The running mean and variance of a ``VecNormalize``, which go on running.

    A copy of a policy reads the same ones, as it holds the same weights.
    """

    def __init__(self, running: Any) -> None:
        self.running = running

    def __deepcopy__(self, memo: dict[int, Any]) -> Statistics:
        return self


class Normalise(nn.Module):
    """``(x - mean) / sqrt(var + epsilon)``, clipped, in float64 as it is there."""

    def __init__(self, running: Any, epsilon: float, clip: float) -> None:
        super().__init__()
        self.statistics = Statistics(running)
        self.epsilon, self.clip = epsilon, clip

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (torch.as_tensor(one, device=x.device) for one in self._of_now())
        return ((x - mean) / (var + self.epsilon).sqrt()).clamp(-self.clip, self.clip)

    def _of_now(self) -> tuple[Any, Any]:
        return self.statistics.running.mean, self.statistics.running.var


def normalisers(vec_normalize: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Module]:
    """What a ``VecNormalize`` does to each entry of an observation, by name.

    Raises:
        InputError: if it is none, or is of other observations.
    """
    if not hasattr(vec_normalize, "normalize_obs"):
        raise InputError(
            f"normalize= takes the VecNormalize that the agent was trained in, or False where observations are "
            f"normalised already; found a {type(vec_normalize).__name__}"
        )
    if not vec_normalize.norm_obs:
        return {}
    running = vec_normalize.obs_rms
    if isinstance(running, dict):
        found = {name: running[name] for name in vec_normalize.norm_obs_keys}
    else:
        found = {"": running}
    for name, one in found.items():
        if tuple(one.mean.shape) != shapes.get(name):
            raise InputError(
                f"the VecNormalize has statistics of {name or 'an observation'!r} of shape {tuple(one.mean.shape)}; "
                f"the policy reads {shapes}"
            )
    return {name: Normalise(one, vec_normalize.epsilon, vec_normalize.clip_obs) for name, one in found.items()}
