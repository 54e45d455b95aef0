"""Way of use 1: the hooked policy in a training loop.

The collector runs the hooked policy; the loss trains the plain actor. Each batch carries the activations
and saliencies of the network that acted, and a probe learns from it while the agent does.

    python -m tdhook_rl.examples.train_ppo --frames 40960
"""

from __future__ import annotations

import argparse

import torch
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.rollout import EPISODE, GroupSplit, OnlineProbe


def train(frames: int = 40_960, seed: int = 0) -> dict[str, float]:
    """Train for some frames; returns the last measurements."""
    torch.manual_seed(seed)
    actor, critic = make_actor(), make_critic()
    ppo = PPO(actor, critic)
    probe = OnlineProbe(
        features=("cache", FC2),
        label=("concept", "xor"),
        split=GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3),
        decay=0.5,
    )
    lights = CueCorners.light_features()
    measured: dict[str, float] = {}
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    with method.prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[128], seed=seed),
            policy,
            frames_per_batch=2048,
            total_frames=frames,
            postproc=policy.annotate,
            auto_register_policy_transforms=False,
        )
        try:
            for data in collector:
                ended = data["next", "terminated"]
                saliency = data["attr", "observation"].abs()[..., lights].mean((0, 1))
                measured = {
                    "success": float((data["next", "reward"][ended] > 0).float().mean()),
                    "xor_probe": probe.update(data)["accuracy"],
                    "relevant_over_irrelevant": float(saliency[:2].mean() / saliency[2:].mean()),
                }
                print("  ".join(f"{name} {value:.2f}" for name, value in measured.items()), flush=True)
                ppo.update(data)  # trains the plain actor; the hooked policy shares its weights
        finally:
            collector.shutdown()
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40_960)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
