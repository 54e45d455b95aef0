"""Way of use 1: the hooked policy in a training loop.

The collector runs the hooked policy; the loss trains the plain actor. Each batch carries the activations
and saliencies of the network that acted, and a monitor logs what they show: two lines in the loop.

    python -m tdhook_rl.examples.train_ppo --frames 40960 --folder runs/ppo
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.report import Monitor
from tdhook_rl.rollout import EPISODE, GroupSplit, NetworkDiagnostics, OnlineProbe


def train(frames: int = 40_960, seed: int = 0, folder: Path | None = None) -> dict[str, float]:
    """Train for some frames; returns the last numbers."""
    torch.manual_seed(seed)
    actor, env = make_actor(), CueCorners(batch_size=[128], seed=seed)
    ppo, lights = PPO(actor, make_critic()), CueCorners.light_features().tolist()
    split = GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3)
    probe = OnlineProbe(features=("cache", FC2), label=("concept", "xor"), split=split, decay=0.5)
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    found: dict[str, float] = {}
    with method.prepare(actor) as policy:
        monitor = Monitor(
            policy,
            folder or tempfile.mkdtemp(),  # or a TorchRL logger, a W&B run, a list of them
            env=env,
            groups={"needed": lights[:2], "unneeded": lights[2:]},
            probes={"xor": probe},
            diagnostics=NetworkDiagnostics(actor, sites=[FC2]),
            seed=seed,
        )
        options = {"frames_per_batch": 2048, "total_frames": frames, "auto_register_policy_transforms": False}
        collector = Collector(env, policy, postproc=policy.annotate, **options)
        try:
            for data in collector:
                found = monitor.step(data) or found
                shown = ("episodes.return", "probe.xor.accuracy", "mass.observation.needed")
                print("  ".join(f"{name} {found[name]:.2f}" for name in shown), flush=True)
                ppo.update(data)  # trains the plain actor; the hooked policy shares its weights
        finally:
            collector.shutdown()
            monitor.close()
    print(f"all of it is in {monitor.folder}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40_960)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder for the logs")
    train(**vars(parser.parse_args()))
