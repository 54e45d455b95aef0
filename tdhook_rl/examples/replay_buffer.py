"""Way of use 2: offline analysis of a replay buffer.

A memory-mapped buffer is read in storage order; saliencies and activations go to memory-mapped files
beside it, row for row, and a probe is fitted from the same pass over the data.

    python -m tdhook_rl.examples.replay_buffer --folder runs/buffer
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_trained_actor
from tdhook_rl.replay import analyze, in_order
from tdhook_rl.rollout import EPISODE, GroupSplit, OnlineProbe


def collect(actor: ProbabilisticActor, folder: Path, frames: int, seed: int) -> TensorDictReplayBuffer:
    """A buffer of transitions, as any off-policy training leaves behind."""
    buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(frames, scratch_dir=folder), batch_size=256)
    env = CueCorners(batch_size=[64], seed=seed)
    collector = Collector(env, actor, frames_per_batch=1024, total_frames=frames, auto_register_policy_transforms=False)
    for data in collector:
        buffer.extend(data.reshape(-1))
    collector.shutdown()
    return buffer


def analyse(folder: Path, frames: int = 8192, seed: int = 0, actor: ProbabilisticActor | None = None) -> TensorDict:
    """Collect a buffer, annotate it, and fit a probe; returns the results, row for row."""
    actor = make_trained_actor(seed=seed) if actor is None else actor
    buffer = collect(actor, folder / "buffer", frames, seed)
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    with method.prepare(actor) as policy:
        results = analyze(policy, buffer, folder / "results", batch_size=1024)
    probe = OnlineProbe(
        features=("cache", FC2),
        label=("concept", "xor"),
        split=GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3),
    )
    for start, batch in in_order(buffer, batch_size=1024):
        scores = probe.update(batch.copy().update(results[start : start + len(batch)]))
    print(f"{len(buffer)} rows read, results in {folder / 'results'}, probe accuracy {scores['accuracy']:.2f}")
    probe.probe.save(folder / "xor_probe")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for the buffer and the results")
    parser.add_argument("--frames", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    analyse(**vars(parser.parse_args()))
