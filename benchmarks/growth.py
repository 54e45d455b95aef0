"""How cost grows: with sites, methods, concepts, rows, path steps, environments, workers and buffers.

python -m benchmarks.growth
python -m benchmarks.growth --only "a buffer"

Each is measured at a few sizes, in interleaved rounds. In each round a line through logarithms, by least squares, gives
an exponent: 1 where twice as much takes twice as long. Small sizes pay what every call costs, so that beside it stands
the exponent from the last size but one to the last.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector

from benchmarks.analyze_cost import filled
from benchmarks.analyze_cost import make_actor as make_wide_actor
from benchmarks.budgeted import digits
from benchmarks.collector_cost import batches, hooked, make_net
from benchmarks.nets import CLASSES, mlp
from benchmarks.pairs import Median, measure
from benchmarks.peers import ours
from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.replay import analyze
from tdhook_rl.rollout import EPISODE, GroupSplit, ProbeSuite

__all__ = ["GROWING", "Growth", "figures"]

Run = Callable[[], Any]


@dataclass(frozen=True)
class Growth:
    """What it takes at a few sizes.

    Attributes:
        what: grows.
        of: what is run.
        sizes: ascending.
        medians: milliseconds at each size.
        quartiles: the first and third at each.
        exponent: of a power of the size: its median over the rounds and 95 % interval.
        last: the same from the last size but one to the last.
        rounds: how many.
        clock: the processor's time, or the wall's.
    """

    what: str
    of: str
    sizes: tuple[int, ...]
    medians: tuple[float, ...]
    quartiles: tuple[tuple[float, float], ...]
    exponent: Median
    last: Median
    rounds: int
    clock: str

    @classmethod
    def fitted(cls, what: str, of: str, seconds: Mapping[int, np.ndarray], clock: str = "cpu") -> Growth:
        """From the seconds at each size, one entry a round."""
        sizes, times = tuple(seconds), np.stack(list(seconds.values())) * 1e3
        scale, logs = np.log(sizes), np.log(times)
        quartiles = tuple(tuple(map(float, np.quantile(row, (0.25, 0.75)))) for row in times)
        exponents = np.polyfit(scale, logs, 1)[0]
        last = (logs[-1] - logs[-2]) / (scale[-1] - scale[-2])
        medians = tuple(map(float, np.median(times, axis=1)))
        return cls(what, of, sizes, medians, quartiles, Median.of(exponents), Median.of(last), times.shape[1], clock)

    def as_dict(self) -> dict[str, Any]:
        """The growth as numbers and words, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        times = "  ".join(f"{size}: {time:.3g} ms" for size, time in zip(self.sizes, self.medians, strict=True))
        exponent, last = (f"{digits(one.median)} [{digits(one.low)}, {digits(one.high)}]" for one in _both(self))
        return f"{self.what:14} {self.of:34} exponent {exponent}, at the end {last}   {times}"


def _both(growth: Growth) -> tuple[Median, Median]:
    return growth.exponent, growth.last


# ------------------------------------------------------------------ what grows


def sites(stack: ExitStack) -> dict[int, Run]:
    """The outputs of so many layers of one network are cached."""
    problem = mlp(16, 64, 64)
    policy = TensorDictModule(problem.net, in_keys=["input"], out_keys=["output"])
    data = TensorDict({"input": problem.x}, batch_size=len(problem.x))

    def run(count: int) -> Run:
        paths = [f"module.{2 * place + 1}" for place in range(count)]
        prepared = stack.enter_context(ActivationCaching(paths).prepare(policy))

        def call() -> None:
            with torch.no_grad():
                for _ in range(20):
                    prepared(data.copy())

        return call

    return {count: run(count) for count in (2, 4, 8, 16)}


def methods(stack: ExitStack) -> dict[int, Run]:
    """So many saliencies, each of an output of its own, in one ``Compose``."""
    problem = mlp(3, 64, 1024)
    data = TensorDict({"input": problem.x}, batch_size=len(problem.x))

    def run(count: int) -> Run:
        made = [
            Saliency(target=targets.logit(place % CLASSES, key="output"), attribution_key=f"attr{place}")
            for place in range(count)
        ]
        prepared = stack.enter_context(Compose(*made).prepare(problem.net))
        return lambda: [prepared.annotate(data) for _ in range(5)]

    return {count: run(count) for count in (1, 2, 4, 8)}


def concepts(stack: ExitStack) -> dict[int, Run]:
    """A look of a probe suite at three sites, with so many concepts."""
    actor = make_actor()
    split = GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3)
    env = CueCorners(batch_size=[128], seed=0)
    collector = Collector(env, actor, frames_per_batch=2048, total_frames=2048)
    data = next(iter(collector))
    collector.shutdown()
    paths = [f"module.0.module.{place}" for place in (1, 3, 5)]

    def run(count: int) -> Run:
        named = {f"bit {place}": partial(_bit, place=place % 4) for place in range(count)}
        suite = ProbeSuite(actor, sites=paths, concepts=named, split=split, decay=0.5, penalty=1e-3)
        return lambda: suite.update(data)

    return {count: run(count) for count in (2, 4, 8, 16)}


def _bit(data: TensorDict, place: int) -> torch.Tensor:
    return data["concept", "bits"][..., place]


def rows(method: str, stack: ExitStack) -> dict[int, Run]:
    """A batch of so many rows is explained, with the defaults."""
    return {count: ours(method, mlp(3, 64, count), stack)[1] for count in (64, 256, 1024, 4096)}


def steps(stack: ExitStack) -> dict[int, Run]:
    """Integrated gradients with so many points of the path."""
    return {count: ours("IntegratedGradients", mlp(3, 64, 256), stack, steps=count)[1] for count in (16, 32, 64, 128)}


def environments(method: str, stack: ExitStack) -> dict[int, Run]:
    """A batch of a collector with so many batched environments, 16 steps of each."""
    net = make_net("mlp")

    def run(count: int) -> Run:
        policy = hooked(net, "mlp", method, stack).policy
        collector = Collector(
            CueCorners(batch_size=[count], seed=0),
            policy,
            frames_per_batch=16 * count,
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
        stack.callback(collector.shutdown)
        return iter(collector).__next__

    return {count: run(count) for count in (8, 32, 128, 512)}


def workers(stack: ExitStack) -> dict[int, Run]:
    """A batch of so many worker processes, each of which collects as many frames as one alone."""
    net = make_net("mlp")
    return {count: batches(hooked(net, "mlp", "caching", stack), 128, count, stack).__next__ for count in (1, 2)}


def buffer(stack: ExitStack) -> dict[int, Run]:
    """Activations of a memory-mapped buffer of so many rows, written and checked."""
    actor = make_wide_actor(256)
    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    policy = stack.enter_context(ActivationCaching("module.0.module.5").prepare(actor))

    def run(count: int) -> Run:
        stored = filled(actor, count, place / f"buffer {count}")
        names = (place / f"{count} {number}" for number in range(1_000_000))
        return lambda: analyze(policy, stored, next(names), batch_size=8192, progress=False)

    return {count: run(count) for count in (16_384, 32_768, 65_536, 131_072)}


@dataclass(frozen=True)
class Axis:
    """What grows, in what, how the runs are made, and the clock."""

    what: str
    of: str
    make: Callable[[ExitStack], dict[int, Run]]
    clock: Literal["cpu", "wall"] = "cpu"


GROWING = (
    Axis("sites", "ActivationCaching, 64 rows", sites),
    Axis("methods", "Compose of saliencies, 1,024 rows", methods),
    Axis("concepts", "ProbeSuite, 3 sites, 2,048 rows", concepts),
    Axis("rows", "Saliency, annotate", partial(rows, "Saliency")),
    Axis("rows", "IntegratedGradients, annotate", partial(rows, "IntegratedGradients")),
    Axis("path steps", "IntegratedGradients, 256 rows", steps),
    Axis("environments", "a collector, caching", partial(environments, "caching")),
    Axis("environments", "a collector, saliency per step", partial(environments, "saliency per step")),
    Axis("workers", "128 environments each, caching", workers, "wall"),
    Axis("a buffer", "analyze, activations", buffer),
)


def figures(rounds: int = 10, only: str = "", within: float = float("inf")) -> Iterator[Growth]:
    """Measure axis by axis.

    Args:
        rounds: interleaved, of all sizes.
        only: a part of an axis's name; the others are left out.
        within: seconds that an axis may take for more than five rounds.
    """
    for axis in GROWING:
        if only in axis.what:
            with ExitStack() as stack:
                runs = axis.make(stack)
                names = {str(size): run for size, run in runs.items()}
                seconds = measure(names, rounds, clock=axis.clock, within=within)
            yield Growth.fitted(axis.what, axis.of, {size: seconds[str(size)] for size in runs}, axis.clock)


def main(rounds: int, only: str) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    for growth in figures(rounds, only):
        print(growth, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="a part of what grows")
    main(**vars(parser.parse_args()))
