"""CPU time of a frame of each environment under random actions: batched, one copy in Gymnasium, and MiniGrid.

python -m benchmarks.env_speed --rounds 5
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import gymnasium
import numpy as np
import torch
import torchrl
from torchrl.envs import EnvBase

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from tdhook_rl.envs import Cheese, ConceptEnv, CueCorners, CueGrid, KeyDoor, KnownValue, TMaze
from tdhook_rl.envs.minigrid_labels import make_minigrid

BATCHES = (1, 128, 1024)
ONE, UNLABELLED, MINIGRID = "one in Gymnasium", "without labels", "MiniGrid-DoorKey-5x5-v0"
ENVS: dict[str, Callable[..., ConceptEnv]] = {
    "KnownValue": KnownValue,
    "CueCorners": CueCorners,
    "CueGrid": CueGrid,
    "TMaze": TMaze,
    "Cheese": Cheese,
    "Cheese, 64 mazes": partial(Cheese, mazes=64, region="anywhere"),
    "KeyDoor": KeyDoor,
}


def rollout(env: EnvBase, steps: int) -> int:
    return env.rollout(steps, break_when_any_done=False).numel()


def gymnasium_steps(env: gymnasium.Env, steps: int = 100) -> int:
    env.reset()
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return steps


def per_frame(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a frame of each."""
    frames = {name: run() for name, run in runs.items()}
    return {name: seconds / frames[name] for name, seconds in measure(runs, rounds).items()}


def figures(rounds: int = 5, batches: Sequence[int] = BATCHES) -> Iterator[Figure]:
    """Milliseconds of a frame in batches of copies beside one copy in Gymnasium; then of MiniGrid with labels."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    for name, make in ENVS.items():
        face = gymnasium.make(make().gymnasium_id, **getattr(make, "keywords", {}))
        copies = {batch: f"{batch} copies" if batch > 1 else "1 copy" for batch in batches}
        runs = {named: partial(rollout, make(batch_size=[batch], seed=0), 32) for batch, named in copies.items()}
        found = per_frame({**runs, ONE: partial(gymnasium_steps, face)}, rounds)
        for named in runs:
            yield from figures_of("a frame", name, named, found, [Budget(ONE)])
    if find_spec("minigrid") is not None:
        runs = {
            "with labels": partial(rollout, make_minigrid(MINIGRID), 64),
            UNLABELLED: partial(rollout, make_minigrid(MINIGRID, labels=False), 64),
            ONE: partial(gymnasium_steps, gymnasium.make(MINIGRID)),
        }
        budgets = [Budget(UNLABELLED), Budget(ONE)]
        yield from figures_of("a frame", "MiniGrid DoorKey-5x5", "with labels", per_frame(runs, rounds), budgets)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    show(figures(rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
