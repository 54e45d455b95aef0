"""Workers that are spawned, as TorchRL starts them: they import what they are sent, and nothing is there before.

The other tests fork theirs from a process that has imported it all (see ``conftest.py``).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import ParallelEnv

from tdhook_rl import Compose, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ControlRecord, SteeringVectors

pytestmark = [pytest.mark.limit(120), pytest.mark.usefixtures("spawned")]


def test_a_hooked_policy_travels_to_spawned_collectors() -> None:
    method = Compose(Saliency(when="step"), SteeringVectors({FC2: torch.randn(64)}, alpha=0.0), ControlRecord())
    with method.prepare(make_actor()) as policy:
        collector = MultiSyncCollector(
            [lambda: CueCorners(batch_size=[2])], policy, frames_per_batch=32, total_frames=160, cat_results="stack"
        )
        seen = []
        try:
            for index, data in enumerate(collector):
                if not index:
                    again = policy.annotate(data.exclude("attr", "computed"), on_mismatch="raise")
                    torch.testing.assert_close(again["attr", "observation"], data["attr", "observation"])
                seen.append(data["control", "steering.alpha"].clone())
                policy.controls["steering.alpha"] = float(index + 1)
        finally:
            collector.shutdown()
    assert bool((seen[0] == 0).all())
    assert bool((seen[-1] >= 3).all())  # workers may be one batch ahead of what is set


def test_a_hooked_policy_acts_in_spawned_environments() -> None:
    env = ParallelEnv(1, partial(CueCorners, batch_size=[2]))
    try:
        with Saliency(when="step").prepare(make_actor()) as policy:
            data = env.rollout(4, policy, break_when_any_done=False)
            again = policy.annotate(data.exclude("attr", "computed"))
    finally:
        env.close()
    torch.testing.assert_close(again["attr", "observation"], data["attr", "observation"])
