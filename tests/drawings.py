"""Each figure from names and values of all kinds: what the tests of figures draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tdhook_rl.report import figures
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.statistics import Interval


def interval(value: float, reach: float = 0.05, groups: int = 32) -> Interval:
    return Interval(
        estimate=value, low=value - reach, high=value + reach, confidence=0.95, method="t", groups=groups, rows=groups
    )


ODD = ("$x_1$ and $y$", "_hidden", "a < b & c > d", "ключ 鍵 🔑", "\x00two\nlines", "module.0." * 30)


def bars(names: Any, value: Callable[[int], Any]) -> Drawing:
    groups = {name: {"trained": value(at), "untrained": 0.1 * at} for at, name in enumerate(names)}
    return figures.grouped_bars(groups, unit="mean |gradient|", matters=list(names)[:1])


def curve(values: Any) -> list[tuple[int, Any]]:
    return [(100 * step, value) for step, value in enumerate(values)]


def probes(names: Any, values: Any) -> Drawing:
    return figures.probe_curves({name: {"trained": curve(values), "untrained": curve(values)} for name in names},
                                {"success": curve(values)})  # fmt: skip


def numbers(values: Any) -> np.ndarray:
    """The estimates alone; what is not finite is NaN."""
    found = np.array([float(one) for one in values])
    return np.where(np.isfinite(found), found, np.nan)


def pictures(names: Any, values: Any) -> tuple[np.ndarray, list[str]]:
    """A map for each name, of the values."""
    names = list(names)[:40]
    return np.stack([np.resize(numbers(values), (5, 7)) + at for at in range(len(names))]), names


def maps(names: Any, values: Any) -> Drawing:
    return figures.attribution_maps(*pictures(names, values))


def overlays(names: Any, values: Any) -> Drawing:
    found, names = pictures(names, values)
    return figures.overlays(np.zeros((len(found), 10, 14, 3), np.uint8), found, names)


def histograms(names: Any, values: Any) -> Drawing:
    known = np.nan_to_num(numbers(values))
    lines = []
    for step in range(len(known)):
        counts, edges = np.histogram(known[: step + 1] + 1e-3, bins=8)
        lines.append({"step": 100 * step, "name": "a", "counts": counts.tolist(), "edges": edges.tolist()})
    return figures.histograms_over_time(lines, unit=next(iter(names)))


def health(names: Any, values: Any) -> Drawing:
    return figures.network_health({f"{one}/{name}": curve(values) for one in ("dormant", "dead", "norm")
                                   for name in names} | {"churn": curve(values), "loss": curve(values)})  # fmt: skip


def episode(names: Any, values: Any) -> Drawing:
    found = numbers(values)
    return figures.attribution_through_episode(
        np.stack([found + 0.1 * at for at in range(len(names))], 1), list(names), actions=np.arange(len(found)) % 3,
        action_names=list(names), rewards=found, others={next(iter(names)): found},
    )  # fmt: skip


def overview(names: Any, values: Any) -> Drawing:
    one = next(iter(names))
    return figures.overview(
        {name: {"trained": values[0], "untrained": 0.1} for name in names},
        {one: {"trained": curve(values), "untrained": curve(values)}},
        range(len(values)),
        values,
    )


NAN = float("nan")
#: By figure: from names and from values a drawing.
SHAPES: dict[str, Callable[[Any, Any], Drawing]] = {
    "seed_curves": lambda names, values: figures.seed_curves(
        {name: curve(values) for name in list(names)[: 3 if len(names) <= len(ODD) else 60]}, unit="success"
    ),
    "attribution_maps": maps,
    "overlays": overlays,
    "histograms_over_time": histograms,
    "network_health": health,
    "attribution_through_episode": episode,
    "overview": overview,
    "value_grid": lambda names, values: figures.value_grid(
        {name: {other: values[at % len(values)] for at, other in enumerate(list(names)[:12])} for name in names},
        unit="accuracy",
        marked=[(next(iter(names)), next(iter(names)))],
    ),
    "grouped_bars": lambda names, values: bars(names, lambda at: values[at % len(values)]),
    "probe_curves": probes,
    "lines": lambda names, values: figures.lines({name: curve(values) for name in list(names)[:5]}, unit="share"),
    "dose_curve": lambda names, values: figures.dose_curve(
        range(len(values)),
        values,
        competence={next(iter(names)): values},
        random=np.full((3, len(values)), 0.1),
        shuffled=np.full((2, len(values)), 0.2),
        runs={"run 1": numbers(values)},
        half=values[0],
    ),
}
VALUES: dict[str, list[Any]] = {
    "one": [0.5],
    "many": list(np.linspace(0, 1, 300)),
    "none": [NAN, NAN],
    "gaps": [0.1, NAN, 0.3, NAN, float("inf"), 0.5, 0.6],
    "intervals": [interval(0.5), interval(0.9, NAN), 0.7, interval(NAN, NAN)],
    "of all sizes": [1e9, -3e12, 5.0, 1e-12],
    "same": [0.25] * 3,
}
NAMES: dict[str, Any] = {
    "one": ["a"],
    "thousand": [f"concept.{number}" for number in range(1000)],
    "odd": ODD,
}
MEASURED = [interval(0.5), interval(0.9, 0.02), 0.7, interval(0.3, 0.2), 0.1]
