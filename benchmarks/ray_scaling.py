"""``analyze(engine="ray")``: two workers beside one, what a chunk costs whom, and what that says of a thousand.

python -m benchmarks.ray_scaling            # four minutes on two quiet cores; needs tdhook_rl[ray]
python -m benchmarks.ray_scaling --write    # the same, and docs/ray_scaling.md

The rate of one and of two workers is taken from a quarter of the chunks on, when all actors run, to shortly before the
end, by turns, as often as --repeats says. What two processes of this machine do without Ray is measured beside it, by
turns too: where other programs want the processors, or cores share them, they do not do twice as much either. CPU time
does not count others in: by it two cores of one's own would do 2 w / (w + d + r) times what one worker does, w, d and r
what a chunk costs the worker, the driver and Ray's own processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from benchmarks.ray_estimate import Costs, page
from tdhook_rl import ActivationCaching
from tdhook_rl.replay import analyze
from tdhook_rl.rollout import EPISODE, GroupSplit, ProbeSuite
from tdhook_rl.rollout.workers import descendants

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ray_scaling.md"
WANTED = 1.6
#: Features of a row, and units of a hidden layer of the network that is dear.
FEATURES, UNITS = 256, 1024
CHUNK = 8192  # what analyze takes by itself here
#: Workers of whom it is measured what one more costs the driver.
POOLS = (1, 4, 8)


def make_policy(units: int, kept: int) -> TensorDictModule:
    torch.manual_seed(0)
    hidden = [
        nn.Linear(FEATURES, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU()
    ]  # fmt: skip
    last = [nn.Linear(units, kept), nn.ReLU(), nn.Linear(kept, 4)]
    return TensorDictModule(nn.Sequential(*(hidden if units else [nn.Linear(FEATURES, 1), nn.ReLU()]), *(
        last if units else [nn.Linear(1, kept), nn.ReLU(), nn.Linear(kept, 4)]
    )), ["observation"], ["logits"])  # fmt: skip


def site(policy: TensorDictModule) -> str:
    """The layer that is kept: the last but one."""
    return f"module.{len(policy.module) - 2}"


def cpu_seconds() -> dict[str, float]:
    """Of the driver, of actors, and of Ray's other processes."""
    found = {"driver": sum(os.times()[:2]), "actors": 0.0, "ray": 0.0}
    for pid, _ in descendants([os.getpid()]):
        try:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        ticks = sum(map(int, rest.split()[11:13]))
        found["actors" if "MapWorker" in name else "ray"] += ticks / os.sysconf("SC_CLK_TCK")
    return found


@dataclass
class Watch:
    """Progress of an analysis: when which part of it was done, and what that took."""

    chunks: int
    start: float = field(default_factory=time.monotonic)
    marks: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)
    began: float = 0.0

    def __call__(self, done: int, rows: int) -> None:
        chunk = done // CHUNK
        if done and not self.began:
            self.began = time.monotonic() - self.start
        if chunk in (self.chunks // 4, self.chunks - 3):
            self.marks.append((chunk, time.monotonic(), cpu_seconds()))

    def found(self) -> dict[str, float]:
        """Chunks per second, and CPU seconds of a chunk by whom."""
        (first, early, before), (last, late, after) = self.marks
        count = last - first
        return {"rate": count / (late - early), "start": self.began} | {
            name: (after[name] - before[name]) / count for name in before
        }


def analysed(policy: TensorDictModule, rows: Path, chunks: int, workers: int) -> dict[str, float]:
    watch = Watch(chunks)
    with tempfile.TemporaryDirectory() as place, ActivationCaching(site(policy)).prepare(policy) as hooked:
        analyze(
            hooked, rows, Path(place) / "results", rows=slice(0, chunks * CHUNK), batch_size=CHUNK, engine="ray",
            workers=workers, progress=watch,
        )  # fmt: skip
    return watch.found()


# ---------------------------------------------------------------------- without Ray


def bare(seconds: float) -> float:
    """Chunks per second of a process that does nothing else."""
    torch.set_num_threads(1)
    policy = make_policy(UNITS, 64)
    data = TensorDict({"observation": torch.randn(CHUNK, FEATURES)}, [CHUNK])
    with ActivationCaching(site(policy)).prepare(policy) as hooked:
        hooked.annotate(data, on_mismatch="ignore")
        start, count = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            hooked.annotate(data, on_mismatch="ignore")
            count += 1
        return count / (time.monotonic() - start)


def ratio_without_ray(pool: Any) -> float:
    [alone] = pool.map(bare, [4.0])
    return sum(pool.map(bare, [4.0] * 2, chunksize=1)) / alone


# ---------------------------------------------------------------------- merging


def suite(seed: int) -> ProbeSuite:
    """Three sites by four concepts, as a worker that collects would fit them."""
    policy = make_policy(128, 64)
    concepts = {f"concept {n}": lambda data, n=n: (data["observation"][..., n] > 0).long() for n in range(4)}
    one = ProbeSuite(policy, sites=["module.1", "module.3", "module.5"], concepts=concepts, split=GroupSplit(EPISODE))
    torch.manual_seed(seed)
    data = TensorDict({"observation": torch.randn(2000, FEATURES)}, [2000])
    one.update(data.set(EPISODE, torch.arange(2000) // 20 + 1000 * seed))
    return one


def merge_costs() -> tuple[float, float]:
    """Megabytes of a shard, and seconds to read it and add it."""
    whole, shard = suite(0), cloudpickle.dumps(suite(1))
    times = []
    for _ in range(5):
        start = time.process_time()
        whole = whole + pickle.loads(shard)
        times.append(time.process_time() - start)
    return len(shard) / 1e6, statistics.median(times)


# ---------------------------------------------------------------------- all of it


def measured(repeats: int, chunks: int, rows: Path) -> Costs:
    """All of it; what was measured is printed as it comes."""
    dear, costs, starts = make_policy(UNITS, 64), Costs(chunk_rows=CHUNK), []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for _ in range(repeats):
            costs.without.append(ratio_without_ray(pool))
            one, two = (analysed(dear, rows, chunks, workers) for workers in (1, 2))
            cost = {name: (one[name] + two[name]) / 2 for name in ("actors", "driver", "ray")}
            costs.ratios.append(two["rate"] / one["rate"])
            costs.by_cpu.append(2 * cost["actors"] / sum(cost.values()))
            costs.worker += one["actors"] / repeats
            starts.append(one["start"])
            print(
                f"one worker {one['rate'] * CHUNK:,.0f} rows/s, two {two['rate'] * CHUNK:,.0f}: {costs.ratios[-1]:.2f} "
                f"times; two processes without Ray {costs.without[-1]:.2f} times; by CPU time {costs.by_cpu[-1]:.2f}; "
                + _said(cost)
            )
    costs.start = statistics.median(starts)
    costs.policy = len(cloudpickle.dumps(dear)) / 1e6
    for kept, workers in [(64, workers) for workers in POOLS] + [(512, 1)]:
        run = analysed(make_policy(0, kept), rows, chunks, workers)
        costs.driver[kept * 4 * CHUNK / 1e6, workers] = run["driver"]
        print(f"a network that costs nothing, {kept} units kept, {workers} workers: {_said(run)}", flush=True)
    costs.shard, costs.merge = merge_costs()
    return costs


def _said(cost: dict[str, float]) -> str:
    return "a chunk: " + ", ".join(f"{name} {1e3 * cost[name]:.1f} ms" for name in ("actors", "driver", "ray"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=32, help="of 8192 rows")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    import ray
    import ray.data

    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=max(POOLS), include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=500 * 2**20,
    )  # fmt: skip
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120  # all run before the first chunk
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "rows"
        count = options.chunks * CHUNK
        TensorDict({"observation": torch.randn(count, FEATURES)}, [count]).memmap(place)
        costs = measured(options.repeats, options.chunks, place)
    ray.shutdown()
    text = page(costs, wanted=WANTED)
    print("\n" + text)
    if options.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
