"""Returns of few episodes with something held in the policy, from the same seeds each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.replaying.ends import ended, first_steps, own_rewards
from tdhook_rl.replaying.environment_state import same_state
from tdhook_rl.replaying.plays import lacking_told, play_seed, require_taken
from tdhook_rl.sweeps.causal.edits import PutUnits


class Held(PutUnits):
    """Some units, held at a value while a policy acts in batches of any shape.

    Args:
        site: where.
        values: of each run: one row, to hold them at, or several, of which one is drawn for each row.
        axis: of the units, from the end.
        units: boolean, ``(units,)``.
        seed: of what is drawn.
    """

    def __init__(self, site: str, values: Sequence[Tensor], axis: int, units: Tensor, seed: int) -> None:
        super().__init__(site, values, axis, units[None])
        self._draws = torch.Generator().manual_seed(stream_of(seed, "held"))

    def __call__(self, rows: Tensor, index: int) -> Tensor:
        features = self.values[index].ndim - 1
        flat = rows.reshape(-1, *rows.shape[rows.ndim - features :])
        pool = self.values[index]
        if len(pool) > 1:
            pool = pool[torch.randint(len(pool), (len(flat),), generator=self._draws)]
        shape = [1] * flat.ndim
        shape[self.axis] = flat.shape[self.axis]
        units = self.units.reshape(shape).to(flat.device)
        return torch.where(units, pool.to(flat), flat).reshape(rows.shape)


def returns_of(
    policy: Callable[[TensorDictBase], TensorDictBase], env: EnvBase, *, episodes: int, max_steps: int, seed: int
) -> Tensor:
    """The returns of episodes with greedy actions, ``(episodes,)``; the global generator stays as it was.

    Args:
        policy: acts.
        env: every row of its batch is one episode at a time.
        episodes: how many.
        max_steps: the longest one may last; what comes later is not counted.
        seed: of the first; each reset goes on behind those of the rows before.
    """
    found: list[Tensor] = []
    how = set_exploration_type(ExplorationType.DETERMINISTIC)
    alone = not env.batch_size and "done" in env.done_keys  # where agents end each for itself, the others go on
    with torch.random.fork_rng(devices=[]), torch.no_grad(), how, same_state(env) as put_back:
        while sum(map(len, found)) < episodes:
            put_back()
            torch.manual_seed(stream_of(seed, "draws", len(found)))
            env.set_seed(play_seed(env, seed, len(found)))
            with lacking_told(env, policy):
                played = env.rollout(max_steps, policy, break_when_any_done=alone)
            require_taken(env, played[..., 0])
            found.append(_first_returns(env, played))
    return torch.cat(found)[:episodes]


def _first_returns(env: EnvBase, rollout: TensorDictBase) -> Tensor:
    """Of the first episode of each row, ``(rows,)``."""
    played = rollout.reshape(-1, rollout.batch_size[-1])
    first = first_steps(ended(played, env))
    after = own_rewards(played, env)["next"]
    rewards = torch.stack([_of_all(after[key].double()) for key in env.reward_keys])
    return (rewards.sum(0) * first).sum(-1).cpu()


def _of_all(rewards: Tensor) -> Tensor:
    """The mean over agents, ``(rows, time)``: as in sweeps, and of rows in a buffer."""
    return rewards.flatten(2).mean(-1) if rewards.ndim > 2 else rewards
