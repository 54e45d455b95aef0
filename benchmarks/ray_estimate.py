"""What bounds a thousand Ray workers, on paper: measured costs of a chunk and of a merge, and what they add up to."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version

WORKERS = (1, 2, 10, 30, 100, 300, 1000)
#: Assumed, not measured: what a machine takes in by its network, and writes, in megabytes per second.
NETWORK, DISK = 1250.0, 1000.0


@dataclass
class Costs:
    """Measured, in seconds of one core and in megabytes, for a chunk unless another thing is named.

    Attributes:
        chunk_rows: rows of a chunk.
        worker: of the worker.
        driver: of the driver, by megabytes of results and number of workers, where the network costs nothing.
        policy: megabytes of the policy, sent to each actor once.
        start: seconds until the first chunk.
        shard, merge: megabytes of a suite of probes, and seconds to read and add one.
        ratios, without, by_cpu: two workers against one; two processes without Ray; by CPU time.
    """

    chunk_rows: int
    worker: float = 0.0
    policy: float = 0.0
    start: float = 0.0
    shard: float = 0.0
    merge: float = 0.0
    driver: dict[tuple[float, int], float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    by_cpu: list[float] = field(default_factory=list)

    @property
    def returned(self) -> float:
        """Megabytes that a chunk sends back."""
        return min(size for size, _ in self.driver)

    @property
    def per_megabyte(self) -> float:
        """What a megabyte of results costs the driver."""
        (less, few), (more, much) = sorted(
            (size, cost) for (size, workers), cost in self.driver.items() if workers == 1
        )
        return max(0.0, (much - few) / (more - less))

    @property
    def by_workers(self) -> dict[int, float]:
        """What a chunk costs the driver, by the number of workers."""
        return {workers: cost for (size, workers), cost in self.driver.items() if size == self.returned}

    @property
    def per_chunk(self) -> float:
        """What a chunk without results would cost the driver: of the pools the dearest."""
        return max(1e-6, max(self.by_workers.values()) - self.per_megabyte * self.returned)

    def most(self, megabytes: float) -> dict[str, float]:
        """Chunks per second that each part can bear, for so many megabytes of results in a chunk."""
        return {
            "the driver": 1 / (self.per_chunk + self.per_megabyte * megabytes),
            "the driver's network": NETWORK / megabytes,
            "the driver's disk": DISK / megabytes,
        }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def rows_of(costs: Costs, seconds: float, megabytes: float) -> list[list[str]]:
    """For each number of workers chunks per second, how much of the workers that is, and what bounds it."""
    bound, most = min((rate, what) for what, rate in costs.most(megabytes).items())[::-1]
    found = []
    for workers in WORKERS:
        asked = workers / seconds
        rate = min(asked, most)
        found.append([
            f"{workers:,}", f"{rate:,.1f}", f"{rate * costs.chunk_rows:,.0f}", f"{rate / asked:.0%}",
            "the workers" if asked <= most else bound,
        ])  # fmt: skip
    return found


def knees(costs: Costs) -> list[list[str]]:
    """How many workers the driver keeps busy, by what a chunk costs a worker and sends back."""
    found = []
    for seconds in (costs.worker, 1.0, 10.0, 60.0):
        line = [f"{seconds:.2g} s"]
        for megabytes in (0.1, costs.returned, 16.0, 128.0):
            bound, most = min((rate, what) for what, rate in costs.most(megabytes).items())[::-1]
            busy = _two(most * seconds)
            line.append(f"{busy:,} ({bound})" if busy else f"less than one ({bound})")
        found.append(line)
    return found


def _two(value: float) -> int:
    """To two digits, downwards."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return int(value // unit * unit)


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


PAGE = """# `analyze(engine="ray")`: from two workers to a thousand

Written by `python -m benchmarks.ray_scaling --write` on {cores} cores, with Ray {ray} and torch {torch}.

## Two workers, measured

Chunks of {rows:,} rows, of which the network takes {worker:.2g} s; one torch thread an actor; the start of actors
({start:.1f} s) excluded. Median of {turns} turns (the least and the most). Where two processes without Ray fall short
of 2, other programs had the cores, and wall time says as little of Ray.

{measured}

## What a chunk costs, measured

| what | measured |
| --- | --- |
| sent to an actor, once | the policy, {policy:.1f} MB; rows are read by the actor, from the folder |
| sent with a chunk | two numbers |
| sent back by a chunk | {returned:.1f} MB: {per_row:.0f} bytes a row |
| worker | {worker_ms:.0f} ms |
| driver: of which for Ray's bookkeeping | {per_chunk:.1f} ms |
| driver: of which for each MB of results (unpacking, checksums, files) | {per_megabyte:.2f} ms |
| driver, by the number of workers | {by} |
| merging a suite of probes, 3 sites by 4 concepts | {shard:.1f} MB, {merge:.0f} ms |

## A thousand workers, on paper

Nothing below was run. Assumed: a chunk costs what it costs here, whatever the number of workers (it was measured up to
{most}; Ray's scheduler looks at all actors in each round, so that a thousand will cost more); one driver collects and
writes, by one core; its network takes {network:,.0f} MB/s (10 Gbit/s) and its disk {disk:,.0f} MB/s; workers read rows
from a file system that gives each what it asks for; no worker is slower than another.

This network ({worker:.2g} s and {returned:.1f} MB a chunk):

{scaled}

The knee is at {knee:,} workers. How many are kept busy where a chunk costs more or sends back more:

{knees}

So a thousand workers pay where a chunk takes a worker about {pays:.2g} s or longer: dear methods (integrated gradients,
perturbations, large networks). Where results are small, larger chunks (`batch_size=`) do as well, since bookkeeping is
by the chunk; where they are large, their bytes bound it, and it takes several analyses, each of a part of the buffer
(`rows=`).

Suites of probes are merged once, at the end:

{merged}
"""


def page(costs: Costs, *, wanted: float) -> str:
    """The page, in Markdown."""
    first = min(costs.most(costs.returned).values())
    measured = [
        [f"`analyze` with Ray, wall time (wanted: {wanted})", spread(costs.ratios)],
        ["two processes without Ray, by turns with it: what the machine gives", spread(costs.without)],
        ["by CPU time: what two cores without other programs would give", spread(costs.by_cpu)],
    ]
    merged = [
        [f"{many:,}", f"{many * costs.merge:.2g} s", f"{math.ceil(math.log2(many)) * costs.merge:.2g} s"]
        for many in (10, 100, 1000)
    ]
    by = ", ".join(f"{1e3 * cost:.1f} ms with {workers}" for workers, cost in sorted(costs.by_workers.items()))
    return PAGE.format(
        cores=os.cpu_count(), ray=version("ray"), torch=version("torch"), rows=costs.chunk_rows, worker=costs.worker,
        start=costs.start, turns=len(costs.ratios), policy=costs.policy, returned=costs.returned,
        measured=table(["two workers against one", "times as fast"], measured),
        per_row=1e6 * costs.returned / costs.chunk_rows, worker_ms=1e3 * costs.worker, per_chunk=1e3 * costs.per_chunk,
        per_megabyte=1e3 * costs.per_megabyte, by=by, shard=costs.shard, merge=1e3 * costs.merge,
        most=max(costs.by_workers), network=NETWORK, disk=DISK, knee=_two(first * costs.worker), pays=1000 / first,
        scaled=table(
            ["workers", "chunks/s", "rows/s", "of the workers' time", "bound by"],
            rows_of(costs, costs.worker, costs.returned),
        ),
        knees=table(["a chunk costs a worker", "0.1 MB", f"{costs.returned:.1f} MB", "16 MB", "128 MB"], knees(costs)),
        merged=table(["suites", "one after the other", "in pairs, on the workers"], merged),
    )  # fmt: skip
