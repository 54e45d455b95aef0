"""Interleaved pairs of runs and the ratio of their process CPU times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Ratio", "compare"]


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


def compare(
    runs: Mapping[str, Callable[[], None]], against: Mapping[str, list[str]], pairs: int = 40
) -> tuple[dict[str, float], list[Ratio]]:
    """Run every contender in turn, again and again, and compare their speeds pair by pair.

    Args:
        runs: what to run, by name; each call does the same amount of work.
        against: for each contender the names it is compared with.
        pairs: how many rounds; each gives one pair of each comparison.

    Returns:
        the median seconds of process CPU time of each contender, and the ratios (above 1: faster).
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for index in range(pairs):
        order = list(runs) if index % 2 else list(runs)[::-1]
        for name in order:
            start = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - start)
    generator = np.random.default_rng(0)
    ratios = []
    for name, others in against.items():
        for other in others:
            values = np.array(seconds[other]) / np.array(seconds[name])
            resampled = np.median(generator.choice(values, (2000, len(values))), axis=1)
            low, high = np.quantile(resampled, [0.025, 0.975])
            ratios.append(Ratio(name, other, float(np.median(values)), float(low), float(high), pairs))
    return {name: float(np.median(values)) for name, values in seconds.items()}, ratios
