"""A set-up to check before training: ``tdhook-rl check tdhook_rl.examples.check:setup``, or from Python.

The command takes any importable function without arguments that returns a hooked policy (or, as here, what
``prepare`` returns), an environment, and the arguments for the collector.
"""

from __future__ import annotations

from typing import Any

import torch

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor


def setup() -> tuple[Any, CueCorners, dict[str, Any]]:
    """A policy that is cached, explained and may be steered, with the environment and the collector's arguments."""
    method = Compose(
        ActivationCaching(FC2),
        Saliency(target=targets.taken_action_log_prob()),
        SteeringVectors({FC2: torch.ones(64)}, alpha=0.0),
    )
    policy = method.prepare(make_actor(), return_context=False)
    return policy, CueCorners(batch_size=[8]), {"frames_per_batch": 512, "postproc": policy.annotate}


if __name__ == "__main__":
    from tdhook_rl.rollout import check

    report = check(*setup())
    print(report)
    report.raise_if_failed()
