"""How often the intervals of ``tdhook_rl.statistics`` hold the true value, for 2 to 200 groups.

``python -m benchmarks.interval_coverage`` prints a table; the nominal rate is .95. The last column is the percentile
bootstrap of rows, which takes the rows of an episode for independent, for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy import stats

from tdhook_rl import statistics

GROUPS = (2, 3, 5, 10, 20, 50, 200)
Draw = Callable[[np.random.Generator, int], statistics.Interval]


def _lengths(draws: np.random.Generator, groups: int) -> np.ndarray:
    """Episodes of 4 to 40 steps."""
    return draws.integers(4, 41, groups)


def normal_mean(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """Rows about a normal mean of their group; the truth is 0."""
    sizes = np.full(groups, 10)
    numbers = np.repeat(np.arange(groups), sizes)
    return statistics.grouped_mean(draws.normal(size=groups)[numbers] + draws.normal(size=len(numbers)), numbers)


def skewed_mean(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """One exponential return for each group; the truth, taken off, is 1."""
    return statistics.grouped_mean(draws.exponential(size=groups) - 1)


def lognormal_mean(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """One lognormal return for each group; the truth, taken off, is its mean. The words say where it covers little."""
    return statistics.grouped_mean(np.exp(draws.normal(size=groups)) - np.exp(0.5))


def rare_mean(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """One hit or none for each group, at a rate of .1, without bounds; the truth, taken off, is .1."""
    return _shifted(statistics.grouped_mean((draws.random(groups) < 0.1).astype(float)), 0.1)


def ratio(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """What part of lognormal weights values near .5 are; the truth, taken off, is .5."""
    weights = np.exp(draws.normal(size=groups))
    return _shifted(statistics.ratio_of_means(weights * (0.5 + 0.3 * draws.normal(size=groups)), weights), 0.5)


def share(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """Hits at a rate of .9 that differs between episodes of unequal length; the truth, taken off, is .9."""
    numbers = np.repeat(np.arange(groups), _lengths(draws, groups))
    hits = draws.random(len(numbers)) < draws.beta(4.5, 0.5, groups)[numbers]
    return _shifted(statistics.grouped_mean(hits.astype(float), numbers, bounds=(0, 1)), 0.9)


def paired(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """Differences of pairs, heavy-tailed; the truth is 0."""
    first = draws.normal(size=groups) * 5
    return statistics.paired_difference(first, first + draws.standard_t(4, groups))


def interquartile(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """The interquartile mean of a heavy-tailed symmetric distribution; the truth is 0."""
    return statistics.iqm(draws.standard_t(2, groups))


def skewed_interquartile(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """The interquartile mean of lognormal returns; the truth, taken off, is 1.065."""
    ends = stats.norm.cdf(stats.norm.ppf([0.25, 0.75]) - 1)
    return _shifted(statistics.iqm(np.exp(draws.normal(size=groups))), 2 * np.exp(0.5) * (ends[1] - ends[0]))


def improvement(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """Two normal samples a standard deviation apart, that many groups each; the truth, taken off, is .760."""
    first, second = draws.normal(size=groups), draws.normal(size=groups) + 1
    return _shifted(statistics.probability_of_improvement(first, second), stats.norm.cdf(1 / np.sqrt(2)))


def _classified(
    draws: np.random.Generator, groups: int, prevalence: float, by_episode: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores ``(groups, 20)``: two standard deviations apart, with a shift of each episode."""
    labels = draws.random((groups, 1 if by_episode else 20)) < prevalence
    labels = np.broadcast_to(labels, (groups, 20))
    return labels, 2 * labels - 1 + 0.6 * draws.normal(size=(groups, 1)) + 0.8 * draws.normal(size=(groups, 20))


def _balanced(prevalence: float, by_episode: bool = True, longest: int = 0) -> Draw:
    def draw(draws: np.random.Generator, groups: int) -> statistics.Interval:
        labels, scores = _classified(draws, groups, prevalence, by_episode)
        rows = np.stack([~labels, labels], -1)
        right = rows & ((scores > 0) == labels)[..., None]
        weights = np.ones((groups, 1))
        weights[0] += longest * groups
        return _shifted(
            statistics.balanced_accuracy(right.sum(1) * weights, rows.sum(1) * weights), stats.norm.cdf(1.0)
        )

    return draw


def _area(prevalence: float, by_episode: bool = True) -> Draw:
    edges = np.linspace(-6, 6, 257)

    def draw(draws: np.random.Generator, groups: int) -> statistics.Interval:
        labels, scores = _classified(draws, groups, prevalence, by_episode)
        bins = np.digitize(scores, edges)
        tables = np.zeros((2, groups, len(edges) + 1))
        np.add.at(tables, (labels.astype(int), np.arange(groups)[:, None], bins), 1.0)
        return _shifted(statistics.area_under_curve(tables[1], tables[0]), stats.norm.cdf(np.sqrt(2)))

    return draw


def explained(draws: np.random.Generator, groups: int) -> statistics.Interval:
    """Values of which a prediction explains .75, errors alike within an episode; the truth, taken off, is .75."""
    values, common = draws.normal(size=(groups, 20)), draws.normal(size=(groups, 1))
    errors = np.sqrt(0.25) * (np.sqrt(0.5) * common + np.sqrt(0.5) * draws.normal(size=(groups, 20)))
    sums = np.stack([np.full(groups, 20.0), values.sum(1), (values**2).sum(1), (errors**2).sum(1)], 1)
    return _shifted(statistics.r_squared(sums), 0.75)


CASES: dict[str, Draw] = {
    "mean": normal_mean,
    "mean, skewed": skewed_mean,
    "mean, lognormal": lognormal_mean,
    "mean, hits at .1": rare_mean,
    "share of .9": share,
    "share of lognormal weights": ratio,
    "paired difference": paired,
    "interquartile mean": interquartile,
    "interquartile mean, lognormal": skewed_interquartile,
    "improvement": improvement,
    "balanced accuracy": _balanced(0.5, by_episode=False),
    "balanced accuracy, concept of the episode": _balanced(0.5),
    "balanced accuracy, 10% of episodes": _balanced(0.1),
    "balanced accuracy, one episode of most rows": _balanced(0.5, longest=4),
    "area under the curve": _area(0.5, by_episode=False),
    "area, concept of the episode": _area(0.5),
    "area, 10% of episodes": _area(0.1),
    "explained variance": explained,
}


def coverage(draw: Draw, groups: int, repeats: int, seed: int = 0) -> tuple[float, float, float]:
    """Of the intervals that there are, the share that holds the truth; the share of repeats without one; mean width."""
    draws = np.random.default_rng([seed, groups])
    found = [draw(draws, groups) for _ in range(repeats)]
    known = [one for one in found if one.known]
    if not known:
        return float("nan"), 1.0, float("nan")
    widths = float(np.mean([one.high - one.low for one in known]))
    return float(np.mean([0.0 in one for one in known])), 1 - len(known) / repeats, widths


def percentile_of_rows(draws: np.random.Generator, groups: int) -> bool:
    """Whether a percentile bootstrap of the group means holds the truth of ``normal_mean``."""
    means = draws.normal(size=groups) + draws.normal(size=groups) / np.sqrt(10)
    again = means[draws.integers(groups, size=(1000, groups))].mean(1)
    low, high = np.quantile(again, [0.025, 0.975])
    return bool(low <= 0 <= high)


def _shifted(found: statistics.Interval, truth: float) -> statistics.Interval:
    from dataclasses import replace

    return replace(found, estimate=found.estimate - truth, low=found.low - truth, high=found.high - truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args().repeats
    print(f"| nominal .95, {repeats} repeats; in brackets: without an interval | {' | '.join(map(str, GROUPS))} |")
    print(f"|---|{'---|' * len(GROUPS)}")
    for name, draw in CASES.items():
        cells = []
        for groups in GROUPS:
            rate, without, _ = coverage(draw, groups, repeats)
            cells.append(f"{rate:.3f}" + (f" ({without:.2f})" if without else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    draws = np.random.default_rng(0)
    rates = [np.mean([percentile_of_rows(draws, groups) for _ in range(repeats)]) for groups in GROUPS]
    print(f"| mean, by a percentile bootstrap | {' | '.join(f'{rate:.3f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
