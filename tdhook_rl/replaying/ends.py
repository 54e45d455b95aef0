"""Where first episodes end: with the environment's ``"done"``, or with each agent's where only agents have one."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from tdhook_rl.errors import InputError


def ended(step: TensorDictBase, env: EnvBase) -> Tensor:
    """Whether the episode is over that each agent is in: ``batch + (agents,)``, one where the environment says it.

    Raises:
        InputError: if the environment writes no ``"done"``.
    """
    keys = [key for key in env.done_keys if _parts(key)[-1] == "done"]
    if not keys:
        raise InputError(f"the environment writes no 'done', so that its episodes have no end; {list(env.done_keys)}")
    found = [step[("next", *_parts(key))] for key in (["done"] if "done" in keys else keys)]
    return torch.cat([one.reshape(*step.batch_size, -1) for one in found], -1)


def before_end(done: Tensor, dim: int = -1) -> Tensor:
    """Whether no earlier step, along a dimension, has ended."""
    return done.long().cumsum(dim) - done.long() == 0


def first_steps(done: Tensor) -> Tensor:
    """The steps up to that by which all agents have ended once, ``(rows, time)``; of ``(rows, time, agents)``.

    Example:
        >>> first_steps(torch.tensor([[[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]]]).bool())
        tensor([[ True,  True,  True,  True, False]])
    """
    return before_end((done.cumsum(-2) > 0).all(-1))


def own_rewards(episodes: TensorDictBase, env: EnvBase) -> TensorDictBase:
    """Without what agents get after their own end: some environments begin again with them, while others go on.

    Args:
        episodes: ``(rows, time)``; changed in place.
        env: of which they are.
    """
    if "done" in env.done_keys:
        return episodes
    for key in env.reward_keys:
        done = episodes.get(("next", *_parts(key)[:-1], "done"), None)
        if done is None:
            continue
        rewards = episodes["next", *_parts(key)]
        own = before_end(done, 1)
        if own.shape != rewards.shape:  # one reward of a group, whose agents end each for itself
            own = own.flatten(2).any(-1).reshape(*own.shape[:2], *(1,) * (rewards.ndim - 2))
        episodes["next", *_parts(key)] = torch.where(own, rewards, torch.zeros_like(rewards))
    return episodes


def _parts(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
