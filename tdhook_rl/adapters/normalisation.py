"""Observations as ``VecNormalize`` of Stable-Baselines3 normalises them, by its statistics of now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdhook_rl.errors import InputError


class Source:
    """Where statistics are that go on running. Copies that hold weights of their own have none."""

    def __init__(self, read: Callable[[], tuple[Any, ...]] | None, tie: Tensor) -> None:
        self.read = read
        self._tie = tie

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        tied = memo.get(id(self._tie)) is self._tie  # the copy holds the same tensors
        return self if tied else Source(None, copy.deepcopy(self._tie, memo))

    def __reduce__(self) -> Any:
        return Source, (None, self._tie)


class Normalise(nn.Module):
    """``(x - mean) / sqrt(var + epsilon)``, clipped, in float64 as it is there, by the statistics of now.

    What they were when it was last looked at is in buffers: copies and pickles go on with these, workers of collectors
    are sent them with the weights, and by them results are told that others have computed.

    Args:
        read: gives mean, variance, epsilon and the limit of now.
    """

    mean: Tensor
    var: Tensor
    limits: Tensor

    def __init__(self, read: Callable[[], tuple[Any, ...]]) -> None:
        super().__init__()
        for name, value in zip(("mean", "var", "limits"), _as_arrays(read), strict=True):
            self.register_buffer(name, torch.from_numpy(value), persistent=False)
        self.tie = torch.empty(0)
        self.source = Source(read, self.tie)

    def forward(self, x: Tensor) -> Tensor:
        read = self.source.read
        if read is None:
            mean, var = self.mean.to(x.device), self.var.to(x.device)
            epsilon, clip = self.limits.to(x.device)
        else:
            mean, var, epsilon, clip = read()
            mean, var = (torch.as_tensor(one, device=x.device) for one in (mean, var))
        found = (x - mean) / (var + epsilon).sqrt()
        return found.clamp(-clip, clip)

    @torch.compiler.disable
    def follow_source(self) -> None:
        """Bring the buffers up to date."""
        if self.source.read is None:
            return
        for held, now in zip((self.mean, self.var, self.limits), _as_arrays(self.source.read), strict=True):
            value = torch.from_numpy(now).to(held)
            if not torch.equal(held, value):
                held.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        self.follow_source()
        return self.__dict__.copy()


def _as_arrays(read: Callable[[], tuple[Any, ...]]) -> tuple[np.ndarray, ...]:
    mean, var, *limits = read()
    return np.array(mean, np.float64), np.array(var, np.float64), np.array(limits, np.float64)


def _of(vec_normalize: Any, name: str) -> tuple[Any, ...]:
    running = vec_normalize.obs_rms[name] if name else vec_normalize.obs_rms
    return running.mean, running.var, vec_normalize.epsilon, vec_normalize.clip_obs


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
    return {name: Normalise(partial(_of, vec_normalize, name)) for name in found}
