"""What ``analyze`` costs beside the loop that one would write: activations of a memory-mapped buffer of a million rows.

python -m benchmarks.analyze_cost
python -m benchmarks.analyze_cost --rows 100000 --width 64 --profile

The loop reads the buffer in chunks and calls the plain policy, and keeps nothing. ``analyze`` reads the same chunks,
calls the hooked policy, holds what it computes against what is stored, and writes activations with checksums that reach
the disk. They take turns, three times each. Where other programs want the processors as well, wall time counts them in;
process CPU time does not count the waiting for the disk. Memory is what the process has that no file stands behind.

A row of results takes 256 bytes whatever the network costs: beside one of a microsecond a row (--width 64), writing
them costs more than it does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data import LazyMemmapStorage, ReplayBuffer
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching
from tdhook_rl.replay import analyze

ALLOWED, MEGABYTES = 1.35, 500
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


def timed(function: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def own_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512, help="of the first two of three hidden layers")
    parser.add_argument(
        "--chunk", type=int, default=8192, help="rows at once, of both; what analyze takes by itself here"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torchrl.logger.setLevel("ERROR")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    actor = make_actor(options.width)
    with tempfile.TemporaryDirectory() as place:
        buffer = filled(actor, options.rows, Path(place) / "buffer")

        def loop() -> None:
            with torch.no_grad():
                for first in range(0, options.rows, options.chunk):
                    actor(buffer.storage[first : first + options.chunk].select(*actor.in_keys))

        def analysed(number: int) -> Callable[[], object]:
            def run() -> None:
                with ActivationCaching("module.0.module.5").prepare(actor) as policy:
                    analyze(policy, buffer, Path(place) / str(number), batch_size=options.chunk, progress=grown)

            return run

        most = 0.0

        def grown(done: int, rows: int) -> None:
            nonlocal most
            most = max(most, own_megabytes())

        if options.profile:
            import cProfile
            import pstats

            profile = cProfile.Profile()
            profile.runcall(analysed(99))
            pstats.Stats(profile).sort_stats("cumtime").print_stats(60)
            return
        loop()
        before, found = own_megabytes(), []
        for number in range(options.repeats):
            plain, hooked = timed(loop), timed(analysed(number))
            found.append((*plain, *hooked))
            print(
                f"loop {plain[0]:6.1f} s ({plain[1]:6.1f} s CPU)   analyze {hooked[0]:6.1f} s ({hooked[1]:6.1f} s CPU)"
                f"   {hooked[0] / plain[0]:.2f} ({hooked[1] / plain[1]:.2f} CPU)"
            )
    medians = [statistics.median(one[at] for one in found) for at in range(4)]
    wall, cpu = medians[2] / medians[0], medians[3] / medians[1]
    print(
        f"\n{options.rows:,} rows, layers of {options.width}, {options.width} and {KEPT}, chunks of {options.chunk}: "
        f"median {wall:.2f} times the loop by wall time, {cpu:.2f} by CPU time ({ALLOWED} allowed); "
        f"{most - before:.0f} MB more than before ({MEGABYTES} allowed)"
    )


if __name__ == "__main__":
    main()
