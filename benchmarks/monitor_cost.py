"""What ``Monitor`` costs in the demo's PPO: the share of time inside it, and inside its calls to log.

python -m benchmarks.monitor_cost
python -m benchmarks.monitor_cost --frames 81920 --repeats 5

Three ways of use, each on runs of its own: about 30 numbers a batch; these, and every fifth batch four pictures and two
histograms, every twentieth a table; and beside all of that a probe with its controls and the health of the network. An
offline W&B run and the local folder take each of them. What is in the monitor but not in calls to log is what it
computes. Where other programs want the processors as well, wall time counts them in at each call; process CPU time
does not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchrl
from torchrl.collectors import Collector

from benchmarks.budgeted import Budget, Figure, figures_of, show
from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.report import Monitor, open_wandb
from tdhook_rl.rollout import EPISODE, GroupSplit, NetworkDiagnostics, OnlineProbe

BATCH, ENVS = 2048, 128
NUMBERS, MEDIA, ALL = "numbers alone", "4 pictures, 2 histograms", "and a probe, controls, health"
WITHOUT = "without"
#: A training with calls to log takes at most so many times one without: 1 % and 3 % of it may be spent there.
ALLOWED = {NUMBERS: 1 / 0.99, MEDIA: 1 / 0.97}


class Clock:
    """Adds up the seconds inside a function: by the wall, and of all threads of the process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.reset()

    def reset(self) -> None:
        self.wall = self.process = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wall, process = time.perf_counter(), time.process_time()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.wall += time.perf_counter() - wall
            self.process += time.process_time() - process


def options_of(way: str, actor: Any) -> dict[str, Any]:
    lights = CueCorners.light_features().tolist()
    rows = torch.arange(CueCorners.observation_features).split(5)  # of the grid, in each of its planes
    groups = {"needed": lights[:2], "unneeded": lights[2:]} | {f"row {n}": row.tolist() for n, row in enumerate(rows)}
    common: dict[str, Any] = {"groups": groups}
    if way == NUMBERS:
        return common | {"media_every": 0, "table_every": 0}
    if way == MEDIA:
        return common
    probe = OnlineProbe(
        features=("cache", FC2),
        label=("concept", "xor"),
        split=GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3),
        decay=0.5,
    )
    return common | {"probes": {"xor": probe}, "diagnostics": NetworkDiagnostics(actor, sites=[FC2])}


def measured(way: str, frames: int, seed: int) -> tuple[float, ...]:
    """Seconds by the wall of all, of calls to log, of the monitor; of the processor all, the monitor; numbers."""
    torch.manual_seed(seed)
    actor = make_actor()
    ppo = PPO(actor, make_critic())
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    with tempfile.TemporaryDirectory() as folder, method.prepare(actor) as policy:
        run = open_wandb(folder, "cost", {})
        assert run is not None
        monitor = Monitor(policy, run, folder=Path(folder) / "local", **options_of(way, actor))
        log, step = Clock(monitor._sinks.log), Clock(monitor.step)
        monitor._sinks.log = log  # type: ignore[method-assign]
        collector = Collector(
            CueCorners(batch_size=[ENVS], seed=seed), policy, frames_per_batch=BATCH,
            total_frames=frames // BATCH * BATCH, postproc=policy.annotate, auto_register_policy_transforms=False,
        )  # fmt: skip
        train, numbers = Clock(ppo.update), 0
        batches = iter(collector)
        collect = Clock(lambda: next(batches, None))
        while (data := collect()) is not None:
            numbers = len(step(data))
            if numbers and not train.wall:  # the first batch imports, and makes W&B's folders
                for clock in (log, step, collect):
                    clock.reset()
            train(data)
        collector.shutdown()
        monitor.close()
    whole = sum(one.wall for one in (step, train, collect))
    processor = sum(one.process for one in (step, train, collect))
    return whole, log.wall, step.wall, processor, step.process, numbers


def figures(rounds: int = 3, frames: int = 81_920, ways: Sequence[str] = (NUMBERS, MEDIA, ALL)) -> Iterator[Figure]:
    """Training with what is measured beside the same training without it, by the wall and by the processor.

    Args:
        rounds: runs, each with a seed of its own.
        frames: of a run.
        ways: of use.
    """
    for way in ways:
        found = np.array([measured(way, frames, seed) for seed in range(rounds)])
        whole, log, step, processor, busy, numbers = found.T
        note = f"{int(numbers[-1])} numbers a batch"
        inside = {"calls to log": whole, WITHOUT: whole - log}
        yield from figures_of("PPO, wall", way, "calls to log", inside, [Budget(WITHOUT, ALLOWED.get(way), note)])
        for what, total, part in (("PPO, wall", whole, step), ("PPO, CPU", processor, busy)):
            inside = {"the monitor": total, WITHOUT: total - part}
            yield from figures_of(what, way, "the monitor", inside, [Budget(WITHOUT)])


def main(frames: int, repeats: int) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    show(figures(repeats, frames))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81_920)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))
