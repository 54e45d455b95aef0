"""What ``analyze`` costs beside the loop that one would write: activations of a memory-mapped buffer of a million rows.

python -m benchmarks.analyze_cost
python -m benchmarks.analyze_cost --rows 100000 --width 64 --profile

The loop reads the buffer in chunks and calls the plain policy, and keeps nothing. ``analyze`` reads the same chunks,
calls the hooked policy, holds what it computes against what is stored, and writes activations with checksums that reach
the disk. They take turns. Where other programs want the processors as well, wall time counts them in;
process CPU time does not count the waiting for the disk. Memory is what the process has that no file stands behind.

A row of results takes 256 bytes whatever the network costs: beside one of a microsecond a row (--width 64), writing
them costs more than it does.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data import LazyMemmapStorage, ReplayBuffer
from torchrl.modules import ProbabilisticActor

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from tdhook_rl import ActivationCaching
from tdhook_rl.replay import analyze

ALLOWED, MEGABYTES = 1.35, 500
LOOP = "a loop of forwards"
#: Features of an observation, units of the last hidden layer, which are kept, and actions.
FEATURES, KEPT, ACTIONS = 64, 64, 6


def make_actor(width: int) -> ProbabilisticActor:
    layers = [
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, KEPT),
        nn.ReLU(),
    ]
    net = nn.Sequential(*layers, nn.Linear(KEPT, ACTIONS))
    module = TensorDictModule(net, ["observation"], ["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def filled(actor: ProbabilisticActor, rows: int, folder: Path) -> ReplayBuffer:
    """A buffer as off-policy training leaves it: transitions, by the policy."""
    buffer = ReplayBuffer(storage=LazyMemmapStorage(rows, scratch_dir=folder), batch_size=256)
    while len(buffer) < rows:
        count = min(50_000, rows - len(buffer))
        data = TensorDict({"observation": torch.randn(count, FEATURES)}, batch_size=count)
        with torch.no_grad():
            data = actor(data)
        done = torch.rand(count, 1) < 0.01
        data["next"] = TensorDict(
            {"observation": torch.randn(count, FEATURES), "reward": torch.randn(count, 1), "done": done},
            batch_size=count,
        )
        buffer.extend(data)
    return buffer


def own_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def figures(
    rounds: int = 3, rows: int = 1_000_000, width: int = 512, chunk: int = 8192, profile: bool = False
) -> Iterator[Figure]:
    """Measure by the wall's time and by the processor's.

    Args:
        rounds: turns of each.
        rows: of the buffer.
        width: of the first two of three hidden layers.
        chunk: rows at once, of both; what ``analyze`` takes by itself here.
        profile: print where ``analyze`` spends its time instead.
    """
    torch.manual_seed(0)
    actor = make_actor(width)
    with tempfile.TemporaryDirectory() as place:
        buffer = filled(actor, rows, Path(place) / "buffer")
        numbers, most = itertools.count(), 0.0

        def loop() -> None:
            with torch.no_grad():
                for first in range(0, rows, chunk):
                    actor(buffer.storage[first : first + chunk].select(*actor.in_keys))

        def analysed() -> None:
            with ActivationCaching("module.0.module.5").prepare(actor) as policy:
                analyze(policy, buffer, Path(place) / str(next(numbers)), batch_size=chunk, progress=grown)

        def grown(done: int, rows: int) -> None:
            nonlocal most
            most = max(most, own_megabytes())

        if profile:
            import cProfile
            import pstats

            profiled = cProfile.Profile()
            profiled.runcall(analysed)
            pstats.Stats(profiled).sort_stats("cumtime").print_stats(60)
            return
        loop()
        before = own_megabytes()
        runs, spent = {"analyze": analysed, LOOP: loop}, {}
        wall = {name: np.zeros(0) for name in runs}

        def timed(name: str) -> Callable[[], None]:
            def run() -> None:
                start = time.perf_counter()
                runs[name]()
                wall[name] = np.append(wall[name], time.perf_counter() - start)

            return run

        spent = measure({name: timed(name) for name in runs}, rounds)
        case = f"{rows:,} rows, {width} wide"
        memory = f"{most - before:.0f} MB more than before ({MEGABYTES} allowed)"
        yield from figures_of("a buffer, CPU", case, "analyze", spent, [Budget(LOOP, ALLOWED, memory)])
        wall = {name: values[1:] for name, values in wall.items()}  # the first was to warm up
        yield from figures_of("a buffer, wall", case, "analyze", wall, [Budget(LOOP, ALLOWED)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512, help="of the first two of three hidden layers")
    parser.add_argument("--chunk", type=int, default=8192, help="rows at once, of both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    show(figures(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
