"""What the tests of ``Monitor`` share: a method, a batch, and what was warned of."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import wandb
from tensordict import TensorDictBase
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2

__all__ = ["METHOD", "QUIET", "batch_of", "said"]

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)


METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))


_CALLS = itertools.count()


def batch_of(policy: Any, steps: int = 10, envs: int = 8, seed: int = 0) -> TensorDictBase:
    env = CueCorners(batch_size=[envs], seed=seed)
    collector = Collector(
        env, policy, frames_per_batch=steps * envs, total_frames=-1, auto_register_policy_transforms=False
    )
    data = next(iter(collector))
    collector.shutdown()
    data["collector", "traj_ids"] += 1000 * next(_CALLS)  # as if one collector had given all batches
    return data


@contextmanager
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told
