"""Frames per CPU second of each environment under random actions: batched, one copy in Gymnasium, and MiniGrid.

python -m benchmarks.env_speed --seconds 1
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import gymnasium
import torch
import torchrl
from torchrl.envs import EnvBase

from tdhook_rl.envs import Cheese, ConceptEnv, CueCorners, CueGrid, KeyDoor, KnownValue, TMaze
from tdhook_rl.envs.minigrid_labels import make_minigrid

BATCHES = (1, 128, 1024)
ENVS: dict[str, Callable[..., ConceptEnv]] = {
    "KnownValue": KnownValue,
    "CueCorners": CueCorners,
    "CueGrid": CueGrid,
    "TMaze": TMaze,
    "Cheese": Cheese,
    "Cheese, 64 mazes": partial(Cheese, mazes=64, region="anywhere"),
    "KeyDoor": KeyDoor,
}


def frames_per_second(frames: Callable[[], int], seconds: float) -> float:
    """The median of three measurements of process CPU time, after a warm-up."""
    frames()
    speeds = []
    for _ in range(3):
        start, count = time.process_time(), 0
        while time.process_time() - start < seconds / 3:
            count += frames()
        speeds.append(count / (time.process_time() - start))
    return median(speeds)


def rollout(env: EnvBase, steps: int) -> int:
    return env.rollout(steps, break_when_any_done=False).numel()


def gymnasium_steps(env: gymnasium.Env, steps: int = 100) -> int:
    env.reset()
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return steps


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    columns = [f"batch {batch}" for batch in BATCHES]
    print(f"{'':28}" + "".join(f"{column:>12}" for column in [*columns, "Gymnasium"]))
    for name, make in ENVS.items():
        speeds = []
        for batch in BATCHES:
            env = make(batch_size=[batch], seed=0)
            speeds.append(frames_per_second(partial(rollout, env, 64 if batch < 1024 else 16), seconds))
        face = gymnasium.make(make().gymnasium_id, **getattr(make, "keywords", {}))
        speeds.append(frames_per_second(partial(gymnasium_steps, face), seconds))
        print(f"{name:28}" + "".join(f"{speed:12,.0f}" for speed in speeds), flush=True)
    try:
        env = make_minigrid("MiniGrid-DoorKey-5x5-v0", labels=False)
    except ImportError as absent:
        print(absent)
        return
    face = gymnasium.make("MiniGrid-DoorKey-5x5-v0")
    for name, one, other in (
        ("MiniGrid DoorKey-5x5", env, face),
        ("  with labels", make_minigrid("MiniGrid-DoorKey-5x5-v0"), None),
    ):
        speed = frames_per_second(partial(rollout, one, 64), seconds)
        alone = f"{frames_per_second(partial(gymnasium_steps, other), seconds):12,.0f}" if other else f"{'':>12}"
        print(f"{name:28}{speed:12,.0f}{'':24}{alone}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    main(**vars(parser.parse_args()))
