"""Interleaved rounds of runs, and medians of what they cost against each other in process CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Median", "Ratio", "compare", "measure", "repetitions"]


@dataclass(frozen=True)
class Median:
    """The median of the rounds and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Median:
        resampled = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class Ratio:
    """The speed of one contender over another's: median of the pairs and its 95 % bootstrap interval."""

    name: str
    against: str
    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.name} / {self.against}: {self.median:.3f} "
            f"(95 % interval {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"
        )


#: Rounds that are run whatever they take.
LEAST = 5


def measure(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeat: int = 1,
    clock: Literal["cpu", "wall"] = "cpu",
    within: float = float("inf"),
) -> dict[str, np.ndarray]:
    """Run every contender in turn, again and again, in alternating order.

    Args:
        runs: what to run, by name; each call does the same amount of work.
        rounds: how many samples of each.
        repeat: calls of one sample.
        clock: CPU time of this process, or wall time where others work for it.
        within: seconds of that clock after which no further round begins, if there were five.

    Returns:
        for each contender its seconds per call, one entry a round.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = now()
    for index in range(rounds):
        if index >= LEAST and now() - began > within:
            break
        order = list(runs) if index % 2 else list(runs)[::-1]
        for name in order:
            run = runs[name]
            start = now()
            for _ in range(repeat):
                run()
            seconds[name].append((now() - start) / repeat)
    return {name: np.array(values) for name, values in seconds.items()}


def repetitions(run: Callable[[], Any], seconds: float = 0.02) -> int:
    """Calls that take at least so long together."""
    repeat = 1
    while True:
        start = time.process_time()
        for _ in range(repeat):
            run()
        spent = time.process_time() - start
        if spent >= seconds:
            return repeat
        repeat = max(2 * repeat, int(repeat * seconds / max(spent, 1e-6)))


def compare(
    runs: Mapping[str, Callable[[], Any]], against: Mapping[str, list[str]], pairs: int = 40
) -> tuple[dict[str, float], list[Ratio]]:
    """Compare the speeds of contenders pair by pair.

    Args:
        runs: what to run, by name; each call does the same amount of work.
        against: for each contender the names it is compared with.
        pairs: how many rounds; each gives one pair of each comparison.

    Returns:
        the median seconds of process CPU time of each contender, and the ratios (above 1: faster).
    """
    seconds = measure(runs, pairs)
    ratios = []
    for name, others in against.items():
        for other in others:
            found = Median.of(seconds[other] / seconds[name])
            ratios.append(Ratio(name, other, found.median, found.low, found.high, pairs))
    return {name: float(np.median(values)) for name, values in seconds.items()}, ratios
