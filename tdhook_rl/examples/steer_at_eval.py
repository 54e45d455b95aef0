"""Way of use 3: steering an agent at evaluation.

A vector is saved, loaded again, and applied in `env.rollout` and in a collector. The strength is a control:
it changes while the policy runs.

    python -m tdhook_rl.examples.steer_at_eval --folder runs/steering
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor

from tdhook_rl import SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_trained_actor
from tdhook_rl.latent import SteeringVector


def contrast(actor: ProbabilisticActor) -> SteeringVector:
    """Corner A pays minus corner B pays: the same states with one light flipped."""
    env = CueCorners()
    off, on = env.paired_states(bit=0)
    pays_a = off["concept", "paying_corner"] == 0
    a, b = torch.cat([off[pays_a], on[~pays_a]]), torch.cat([on[pays_a], off[~pays_a]])
    return SteeringVector.from_pairs(actor, FC2, a, b)


def steer(folder: Path, seed: int = 0, actor: ProbabilisticActor | None = None) -> dict[str, list[float]]:
    """The mean probability of moving towards corner A (up or left), by alpha, in a rollout and a collector."""
    actor = make_trained_actor(seed=seed) if actor is None else actor
    contrast(actor).save(folder / "corner_a")
    vector = SteeringVector.load(folder / "corner_a")
    alphas = [0.0, 0.5, 1.0]
    towards_a: dict[str, list[float]] = {"rollout": [], "collector": []}
    with SteeringVectors(vector, alpha=0.0).prepare(actor) as policy:
        env = CueCorners(batch_size=[64], seed=seed)
        for alpha in alphas:
            policy.controls["steering.alpha"] = alpha
            with torch.no_grad():
                data = env.rollout(20, policy, break_when_any_done=False)
            towards_a["rollout"].append(_towards_a(data["logits"]))
        policy.controls["steering.alpha"] = alphas[0]
        collector = Collector(
            env, policy, frames_per_batch=1280, total_frames=3840, auto_register_policy_transforms=False
        )
        for step, data in enumerate(collector, start=1):
            towards_a["collector"].append(_towards_a(data["logits"]))
            policy.controls["steering.alpha"] = alphas[min(step, 2)]  # the next batch is steered by this
        collector.shutdown()
    for where, values in towards_a.items():
        print(where, "  ".join(f"alpha {alpha}: {value:.2f}" for alpha, value in zip(alphas, values, strict=True)))
    return towards_a


def _towards_a(logits: torch.Tensor) -> float:
    return float(logits.softmax(-1)[..., [0, 2]].sum(-1).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the vector is saved")
    parser.add_argument("--seed", type=int, default=0)
    steer(**vars(parser.parse_args()))
