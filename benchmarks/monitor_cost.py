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
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchrl
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.report import Monitor, open_wandb
from tdhook_rl.rollout import EPISODE, GroupSplit, NetworkDiagnostics, OnlineProbe

BATCH, ENVS = 2048, 128
NUMBERS, MEDIA, ALL = "numbers alone", "4 pictures, 2 histograms", "and a probe, controls, health"
#: What may be spent inside calls to log.
ALLOWED = {NUMBERS: 0.01, MEDIA: 0.03}


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
    """Shares of time inside calls to log (by the wall, of the process), and inside the monitor; numbers of a batch."""
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
    wall, process = (sum(getattr(one, of) for one in (step, train, collect)) for of in ("wall", "process"))
    return log.wall / wall, log.process / process, step.wall / wall, step.process / process, numbers


def main(frames: int, repeats: int) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    print(f"PPO on CueCorners, {frames} frames in batches of {BATCH}; medians of {repeats} runs, wall (process) time")
    print(f"{'':32} | numbers | in calls to log | allowed | in the monitor")
    for way in (NUMBERS, MEDIA, ALL):
        found = [measured(way, frames, seed) for seed in range(repeats)]
        shares = [statistics.median(one[place] for one in found) for place in range(4)]
        log, step = (f"{wall:.2%} ({process:.2%})" for wall, process in (shares[:2], shares[2:]))
        allowed = f"{ALLOWED[way]:.0%}" if way in ALLOWED else "-"
        print(f"{way:32} | {found[0][-1]:7} | {log:>15} | {allowed:>7} | {step:>14}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81_920)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))
