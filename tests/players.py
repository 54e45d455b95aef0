"""What the tests of the episode player share: a policy whose rollout has results, and what a page is given."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import Player
from tdhook_rl.report.player.packing import unpack

READY = "(!!document.querySelector('.tdp') && !document.querySelector('.tdp:not([data-ready])'))"
STEP = "Number(document.querySelector('.tdp-time').getAttribute('aria-valuenow'))"


def rollout(env: Any, policy: Any, steps: int, seed: int = 0) -> TensorDictBase:
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        return policy.annotate(env.rollout(steps, policy, break_when_any_done=False)).detach()


def corners(alpha: float = 0.0, seed: int = 0) -> tuple[Any, CueCorners, TensorDictBase]:
    torch.manual_seed(0)
    method = Compose(
        SteeringVectors({FC2: torch.ones(64)}, alpha=0.0),
        ActivationCaching(FC2),
        Saliency(target={"action": targets.taken_action_log_prob(), "entropy": targets.entropy()}),
        ControlRecord(),
    )
    policy = method.prepare(make_actor(), return_context=False)
    policy.controls["steering.alpha"] = alpha
    env = CueCorners(batch_size=[3], max_steps=15, seed=0)
    return policy, env, rollout(env, policy, 30, seed)


def told(shown: Player) -> dict[str, Any]:
    """What the page is given, without its data."""
    data = json.loads(re.search(r'application/json">(.*?)</script>', shown.fragment(with_code=False), re.DOTALL)[1])
    del data["data"]
    return data


def track(shown: Player, kind: str, name: str, agent: int | None = None) -> np.ndarray:
    """The rows of a track."""
    known = told(shown)["tracks"]
    (found,) = [one for one in known if (one["kind"], one["name"], one["agent"]) == (kind, name, agent)]
    return unpack(shown._contents.arrays[found["array"]])
