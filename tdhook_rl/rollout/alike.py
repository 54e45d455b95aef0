"""Whole episodes of one policy, which another call repeats from the same starts with the same draws."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.replaying.ends import ended, first_steps
from tdhook_rl.replaying.environment_state import same_state
from tdhook_rl.replaying.plays import lacking_told, play_seed, require_taken


@checked
def alike_episodes(
    policy: Any,
    env: EnvBase,
    *,
    episodes: int = 4,
    max_steps: int = 200,
    seed: int = 0,
    deterministic: bool = False,
) -> list[TensorDictBase]:
    """Annotated episodes, each from its own seed: of the environment, and of the actions that are drawn.

    Called with another policy, or with other controls, they start alike, and differ by the policy alone until it acts
    otherwise (an environment that cannot be seeded starts as it likes). The global generators, those of the environment
    that are in this process, and what its transforms hold, are as before.

    Args:
        policy: the hooked policy.
        env: its environment; of one with a batch each row is an episode.
        episodes: how many.
        max_steps: the longest an episode may last.
        seed: of the first; each rollout of the environment goes on behind the seeds of its rows before.
        deterministic: whether the likeliest action is taken rather than drawn.

    Returns:
        a TensorDict of shape ``(time,)`` for each episode. Where only agents end, it lasts until all have ended once.

    Raises:
        InputError: for less than one episode or step.
        MissingKeyError: if the environment does not write what the policy reads.

    Example:
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> with Saliency().prepare(make_actor()) as policy:
        ...     found = [alike_episodes(policy, CueCorners(), episodes=2, max_steps=6) for _ in range(2)]
        >>> [bool((one["observation"] == other["observation"]).all()) for one, other in zip(*found)]
        [True, True]
    """
    require_hooked(policy, "alike_episodes")
    require_counts(episodes=episodes, max_steps=max_steps)
    found: list[TensorDictBase] = []
    how = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with torch.random.fork_rng(), set_exploration_type(how), torch.no_grad(), same_state(env) as put_back:
        turn = 0
        while len(found) < episodes:
            put_back()
            now = play_seed(env, seed, turn)
            torch.manual_seed(stream_of(now, "draws"))
            env.set_seed(now)
            # Where agents end each for itself, the others go on.
            alone = env.batch_size.numel() == 1 and "done" in env.done_keys
            with lacking_told(env, policy):
                data = env.rollout(max_steps, policy, break_when_any_done=alone).detach()
            require_taken(env, data[..., 0])
            rows = data.reshape(-1, data.shape[-1])
            lengths = first_steps(ended(rows, env)).sum(-1).tolist()
            found += [row[:length] for row, length in zip(rows, lengths, strict=True)][: episodes - len(found)]
            turn += 1
    return [policy.annotate(one) for one in found]
