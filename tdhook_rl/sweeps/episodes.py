"""Episodes of many conditions from the same starts with the same noise: as rows of one rollout, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.batched_envs import BatchedEnvBase

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError, TdhookError
from tdhook_rl.replaying.ends import ended, first_steps, own_rewards
from tdhook_rl.replaying.plays import play_seed, require_taken
from tdhook_rl.sweeps.conditions import Place
from tdhook_rl.sweeps.shared_draws import SharedDraws

#: The root of what the steered policy reads of each row.
ROOT = "steering_sweep"
ALPHA = (ROOT, "alpha")
#: The roots of what the steered policy writes.
RESULTS = ("steered", "computed")
#: How many bytes of episodes are held at once.
HELD = 1 << 29
#: Steps of an episode whose length is not known before.
GUESS = 128
#: Steps for which it is tried whether rows meet.
FEW = 3

Sign = Callable[[TensorDictBase], Tensor]


def vector_key(number: int) -> tuple[str, str]:
    """Where a row has what is added at a place."""
    return ROOT, f"vector_{number}"


@dataclass(frozen=True, kw_only=True)
class Steered:
    """What some conditions add.

    Args:
        vectors: for each place ``(conditions, *features)``.
        alphas: ``(conditions,)``.
    """

    vectors: Mapping[Place, Tensor]
    alphas: Tensor

    def __len__(self) -> int:
        return len(self.alphas)

    def rows(self, condition: Tensor, sign: Tensor) -> TensorDict:
        """What the policy reads of rows, given the condition and the sign of each."""
        alphas = self.alphas.to(sign.device)[condition] * sign
        found = TensorDict({ALPHA: alphas}, batch_size=len(condition), device=sign.device)
        for number, vectors in enumerate(self.vectors.values()):
            found[vector_key(number)] = vectors.to(sign.device)[condition]
        return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all conditions have in common.

    Args:
        env: the environment.
        episodes: of each condition.
        max_steps: the longest an episode may last.
        seed: of the starts and the noise.
        sign: for each start the sign of the strength.
        keys: the entries of a step that are kept; ``None``: all.
        put_back: makes environment and policy hold what they held at first.
    """

    env: EnvBase
    episodes: int
    max_steps: int
    seed: int
    sign: Sign | None
    keys: Sequence[NestedKey] | None
    put_back: Callable[[], None]

    def signs(self, starts: TensorDictBase) -> Tensor:
        """One number for each start."""
        count = starts.batch_size.numel()
        if self.sign is None:
            return torch.ones(count, device=starts.device)
        signs = asked(self.sign, starts, what="sign=", reads_only=True)
        if not isinstance(signs, Tensor) or signs.numel() != count or not bool(torch.isfinite(signs).all()):
            got = tuple(signs.shape) if isinstance(signs, Tensor) else type(signs).__name__
            raise InputError(f"sign= gives {got}; it must give one finite number for each of {count} start states")
        return signs.reshape(count).to(torch.get_default_dtype())

    def kept(self, step: TensorDictBase) -> TensorDictBase:
        """What is remembered of a step."""
        done = [("next", *((key,) if isinstance(key, str) else key)) for key in self.env.done_keys]
        return step.exclude(ROOT, "_step") if self.keys is None else step.select(*self.keys, *done)


class Rows:
    """All conditions in one rollout: for environments whose state is in the TensorDict.

    Rows whose episode is over are taken out, so that long episodes do not wait for short ones.
    """

    words = "rows of one rollout"

    def __init__(self, setting: Setting) -> None:
        self._of = setting
        self._noise = SharedDraws(setting.episodes)
        self._width = 0.0

    def at_once(self) -> int:
        """How many conditions are played together, from what a step of an episode takes."""
        if not self._width:
            start = self._start()
            self._width = 2.0 * start.bytes() / len(start) if self._of.keys is None else 16.0
        steps = min(self._of.max_steps, GUESS)
        return max(2, int(HELD / (self._width * steps * self._of.episodes)))

    def _start(self) -> TensorDictBase:
        """The first states, ``(episodes,)``."""
        self._of.put_back()
        return started(self._of.env, self._of.episodes, self._of.seed)

    def apart(self, policy: Any, alone: Steered, beside: Steered) -> bool:
        """Whether rows come out as they do without others beside them, of which one leaves, as tried for few steps.

        They do not where a batch has statistics (``VecNorm``, batch normalisation in training), or something keeps as
        many rows as it began with.

        Args:
            policy: the steered policy.
            alone: one condition.
            beside: the same first, and others.
        """
        try:
            start = self._start()
            first = padded(self._steps(policy, alone, FEW, start=start)[0], self._of.episodes)
            again = padded(self._steps(policy, beside, FEW, start=start, leaves=True)[0], len(start) * len(beside))
        except TdhookError:
            raise
        except Exception:  # it takes no rows but its own: what there is to say is said where they are played
            return False
        again = again[: self._of.episodes, : first.shape[1]]
        return again.shape == first.shape and all(
            key in again.keys(True, True) and alike(value, again[key]) for key, value in first.items(True, True)
        )

    def play(self, policy: Any, steered: Steered) -> Iterator[tuple[TensorDictBase, Tensor]]:
        """Episodes ``(conditions * episodes, time)``, those of a condition together, and which did not end."""
        steps, alive = self._steps(policy, steered, self._of.max_steps, keep=self._of.kept)
        rows = self._of.episodes * len(steered)
        unfinished = torch.zeros(rows, dtype=torch.bool, device=alive.device)
        unfinished[alive] = True
        yield own_rewards(padded(steps, rows), self._of.env), unfinished

    def _steps(
        self,
        policy: Any,
        steered: Steered,
        most: int,
        *,
        keep: Callable[[TensorDictBase], TensorDictBase] | None = None,
        start: TensorDictBase | None = None,
        leaves: bool = False,
    ) -> tuple[list[tuple[Tensor, TensorDictBase]], Tensor]:
        """Which rows were there, and what came of them, step by step; and which are not over.

        Args:
            policy: the steered policy.
            steered: what it reads.
            most: steps at most.
            keep: what is remembered of a step; ``None``: all that is the environment's and the policy's.
            start: the states to begin with; ``None``: those that follow from the seed.
            leaves: whether the last row leaves after the first step.
        """
        setting, env = self._of, self._of.env
        steps: list[tuple[Tensor, TensorDictBase]] = []
        with own_draws(stream_of(setting.seed, "draws")):
            seeded = self._start()
            start = seeded if start is None else start  # an environment without a seed starts as it likes
            signs = setting.signs(start)
            count = setting.episodes
            episode = torch.arange(count, device=start.device).repeat(len(steered))
            condition = torch.arange(len(steered), device=start.device).repeat_interleave(count)
            alive = torch.arange(len(episode), device=start.device)
            data = start[episode].update(steered.rows(condition, signs[episode]))
            over: Tensor | None = None
            for time in range(most):
                self._noise.rows_of(episode[alive])
                with self._noise.seeded(stream_of(setting.seed, "noise", time)):
                    data = policy(data)
                    if time == 0:
                        require_taken(env, data)
                    data = env.step(data)
                steps.append((alive, data.exclude(ROOT, *RESULTS) if keep is None else keep(data)))
                over = ended(data, env) if over is None else over | ended(data, env)
                going = ~over.all(-1)
                if leaves and time == 0:
                    going[-1] = False
                data = env.step_mdp(data)
                if not bool(going.all()):
                    alive, data, over = alive[going], data[going], over[going]
                if not len(alive):
                    break
        return steps, alive


class Blocks:
    """One condition after the other, each from the same seeds: for any environment."""

    words = "one condition after the other"

    def __init__(self, setting: Setting) -> None:
        self._of = setting
        shape = setting.env.batch_size
        self._free = takes_rows(setting.env)
        self._rows = setting.episodes if self._free else max(shape.numel(), 1)
        self._noise = SharedDraws(self._rows)
        # These leave out environments whose episode is over; others play on, and what follows is not looked at. So do
        # these under transforms, of which some keep as many rows as there are.
        self._partial = isinstance(setting.env, BatchedEnvBase)

    def at_once(self) -> int:
        """One condition."""
        return 1

    def play(self, policy: Any, steered: Steered) -> Iterator[tuple[TensorDictBase, Tensor]]:
        """Episodes ``(episodes, time)`` of the one condition, block by block, and which did not end."""
        setting, env = self._of, self._of.env
        left = setting.episodes
        for block in range(-(-setting.episodes // self._rows)):
            seed = play_seed(env, setting.seed * 1_000_003, block)
            setting.put_back()
            with own_draws(stream_of(seed, "draws")):
                if self._free:
                    start = started(env, self._rows, seed)
                else:
                    seed_env(env, seed)
                    start = env.reset()
                signs = setting.signs(start).reshape(-1)
                rows = steered.rows(torch.zeros(len(signs), dtype=torch.long, device=signs.device), signs)
                played = self._played(policy, start, rows.reshape(start.batch_size), seed)
            episodes, unfinished = first_episodes(setting, played)
            yield episodes[:left], unfinished[:left]
            left -= len(episodes)

    def _played(self, policy: Any, data: TensorDictBase, rows: TensorDictBase, seed: int) -> TensorDictBase:
        """Until the first episode of every row is over: ``(*batch, time)``."""
        setting, env = self._of, self._of.env
        steps: list[TensorDictBase] = []
        over = torch.zeros((*data.batch_size, 1), dtype=torch.bool, device=data.device)
        for time in range(setting.max_steps):
            with self._noise.seeded(stream_of(seed, "noise", time)):
                data = policy(data.update(rows))
            if time == 0:
                require_taken(env, data)
            # What the environment is not to see: batched ones hand on other keys where some copies rest.
            written = data.select(*RESULTS, strict=False)
            data = data.exclude(ROOT, *RESULTS)
            if self._partial and time:
                data.set("_step", ~over.all(-1))
                step = env.step(data)
                data = env.step_mdp(step)
            else:
                step, data = env.step_and_maybe_reset(data)
            kept = setting.kept(step)
            steps.append(kept.update(written) if setting.keys is None else kept)
            over = over | ended(step, env)
            if bool(over.all()):
                break
        return torch.stack(steps, -1)


def first_episodes(setting: Setting, played: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
    """``(episodes, time)``, zero after the first episode of each row, with ``"mask"``; and which did not end."""
    done = ended(played, setting.env)
    mask = first_steps(done)
    kept = setting.kept(played)
    kept = kept.reshape(-1, kept.shape[-1]) if kept.ndim > 1 else kept[None]
    mask = mask.reshape(kept.shape)
    found = TensorDict({"mask": mask}, batch_size=kept.shape)
    for key, value in kept.items(True, True):
        if isinstance(value, Tensor):
            inside = mask.reshape(*mask.shape, *(1,) * (value.ndim - 2))
            found[key] = torch.where(inside, value, torch.zeros_like(value))
    return own_rewards(found, setting.env), ~done.any(-2).all(-1).reshape(-1)


def first_episode(rollout: TensorDictBase, done_key: NestedKey = ("next", "done")) -> Tensor:
    """Which steps belong to the first episode of each row: ``batch``, time last.

    Of agents that end each for itself it lasts until all have ended once.
    """
    return first_steps(rollout[done_key].reshape(*rollout.batch_size, -1))


def padded(steps: Sequence[tuple[Tensor, TensorDictBase]], rows: int) -> TensorDictBase:
    """Steps of fewer and fewer rows as ``(rows, time)``, zero where a row is over, with ``"mask"``."""
    found = TensorDict({}, batch_size=[rows, len(steps)])
    mask = torch.zeros(rows, len(steps), dtype=torch.bool, device=steps[0][0].device)
    for time, (alive, _) in enumerate(steps):
        mask[alive, time] = True
    for key, value in steps[0][1].items(True, True):
        if not isinstance(value, Tensor):
            continue
        full = value.new_zeros((rows, len(steps), *value.shape[1:]))
        for time, (alive, step) in enumerate(steps):
            full[alive, time] = step[key]
        found[key] = full
    return found.set("mask", mask)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two are equal but for what another batch size does to the last digits."""
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    return torch.equal(one, other)


def started(env: EnvBase, episodes: int, seed: int) -> TensorDictBase:
    """So many starts as rows, of an environment with an empty batch that is not batch-locked."""
    seed_env(env, seed)
    rows = TensorDict({"_reset": torch.ones(episodes, 1, dtype=torch.bool)}, batch_size=[episodes], device=env.device)
    try:
        found = env.reset(rows).exclude("_reset")
        if found.batch_size == rows.batch_size:
            return found
    except Exception:  # transforms of theirs that know no more rows than the environment has; one by one they do
        seed_env(env, seed)
    return torch.stack([env.reset() for _ in range(episodes)])


def takes_rows(env: EnvBase) -> bool:
    """Whether rows of states can be stepped together, as tried with three."""
    if env.batch_locked or env.batch_size:
        return False
    with own_draws(0), torch.no_grad():
        try:
            start = started(env, 3, 0)
            start[env.action_key] = torch.stack([env.full_action_spec[env.action_key].rand() for _ in range(3)])
            step = env.step(start.clone())
            return env.step_mdp(step).batch_size == step["next"].batch_size == start.batch_size
        except Exception:  # it does not take them: its episodes are played one by one
            return False


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from the seed; afterwards they are what they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def seed_env(env: EnvBase, seed: int) -> str:
    """Seed an environment; why it cannot be, or nothing."""
    try:
        env.set_seed(seed % (1 << 31))
    except Exception as error:  # whatever an environment of others raises
        return str(error) or type(error).__name__
    return ""
