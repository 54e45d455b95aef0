"""What the names of numbers mean, as a monitor gives them: which probe, which control, which site."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tdhook_rl.report.runs.record import Series
from tdhook_rl.statistics import Interval

#: Scores of probes, the first that is there is the main one.
SCORES = ("accuracy", "r2")
CONTROLS = ("input", "shuffled", "untrained")
#: Beyond this no axis has ticks, and no mean is one.
LARGEST = 1e100
_BEHAVIOUR = re.compile(r"(?:^|[./_ ])(?:return|success|reward|score|solved|won)(?:$|[./_ ])", re.IGNORECASE)
#: What a monitor measures of inputs, modules, controls and rows, which may be called anything: no behaviour.
_MEASURED = ("attr", "cache", "probe", "mass", "control", "steered", "computed", "nonfinite", "hist", "final")
#: The measures of a network's health, with their units.
HEALTH = {
    "dormant": "share of units", "dead": "share of units", "effective_rank": "dimensions", "entropy_rank": "dimensions",
    "stable_rank": "dimensions", "norm": "norm of the features", "cka_first": "CKA", "cka_last": "CKA",
    "churn": "share of states", "overlap_first": "share of units", "overlap_last": "share of units", "kl_churn": "nats",
    "value_drift": "mean absolute change", "value_drift_relative": "of the values' size",
    "plasticity_ratio": "of a new network's loss", "plasticity_loss": "squared error",
    "plasticity_loss_fresh": "squared error", "weight_norm": "norm of the weights",
    "spectral_norm": "largest singular value", "gradient_norm": "norm of the gradients",
}  # fmt: skip

#: Of limits of which nobody knows what they are.
REVERSED = "the limits that were logged are the wrong way round"


@dataclass
class ProbeSeries:
    """The numbers of one probe.

    Attributes:
        name: of the concept.
        score: which score it is.
        main: the score over time, with its limits where they are known.
        controls: the score of each control.
        counts: of groups, rows and classes, and rows that were dropped.
    """

    name: str
    score: str
    main: Series
    low: dict[int, float] = field(default_factory=dict)
    high: dict[int, float] = field(default_factory=dict)
    controls: dict[str, Series] = field(default_factory=dict)
    counts: dict[str, Series] = field(default_factory=dict)

    @property
    def last(self) -> Interval | None:
        """The last score that is known, with its interval or why there is none."""
        known = [(step, value) for step, value in self.main if math.isfinite(value)]
        if not known:
            return None
        step, value = known[-1]
        groups, rows = (int(self._count(name, step)) for name in ("groups", "rows"))
        low, high = self.low.get(step, math.nan), self.high.get(step, math.nan)
        if low > high:
            why = REVERSED
        elif not self.low:
            why = "the run logged none"
        elif groups < 2:
            why = f"{groups or 'no'} held-out group{'' if groups == 1 else 's'}: nothing says how much groups differ"
        else:
            why = f"none could be had of {groups} groups"
        return logged_interval(value, low, high, groups=groups, rows=rows, why=why)

    def _count(self, name: str, step: int) -> float:
        value = dict(self.counts.get(name, ())).get(step, 0.0)
        return value if math.isfinite(value) else 0.0

    def curve(self) -> list[tuple[float, ...]]:
        """For a figure: step and score, with limits where any are known."""
        if not self.low:
            return [(step, value) for step, value in self.main]
        nan = math.nan
        return [(step, value, self.low.get(step, nan), self.high.get(step, nan)) for step, value in self.main]


def logged_interval(value: float, low: float, high: float, *, groups: int, rows: int, why: str) -> Interval:
    """A logged number with its limits, which may be anything; ``why`` says in words why there are none."""
    is_known = math.isfinite(low) and math.isfinite(high) and low <= high
    limits = {"low": low, "high": high} if is_known else {"low": math.nan, "high": math.nan, "words": why}
    method = "as logged" if is_known else "none"
    return Interval(estimate=value, confidence=0.95, method=method, groups=groups, rows=rows, **limits)


def probes_of(series: Mapping[str, Series]) -> dict[str, ProbeSeries]:
    """The probes in a log: ``probe.NAME.accuracy`` beside its controls, or ``probe.NAME.trained`` and ``untrained``."""
    found: dict[str, ProbeSeries] = {}
    for full, curve in series.items():
        name, _, score = full.removeprefix("probe.").rpartition(".")
        if not full.startswith("probe.") or not name:
            continue
        if score in SCORES:
            found[name] = ProbeSeries(
                name, score, curve, dict(series.get(f"{full}_low", ())), dict(series.get(f"{full}_high", ()))
            )
        elif score == "trained":
            found.setdefault(name, ProbeSeries(name, "accuracy", curve))
    for name, probe in found.items():
        for control in CONTROLS:
            for full in (f"probe.{name}.{probe.score}.{control}", f"probe.{name}.{control}"):
                if full in series and any(math.isfinite(value) for _, value in series[full]):
                    probe.controls[control] = series[full]
        for count in ("groups", "rows", "classes", "dropped_rows", "held_out_rows", "train_rows"):
            if f"probe.{name}.{count}" in series:
                probe.counts[count] = series[f"probe.{name}.{count}"]
    return found


def measure(name: str) -> str:
    """Which measure of the network's health a name is; empty for none."""
    return next((kind for kind in HEALTH if re.fullmatch(rf"{kind}(?:[./].+)?", name, flags=re.DOTALL)), "")


def behaviour_of(series: Mapping[str, Series]) -> list[str]:
    """The names of what the agent achieves, the telling ones first; no result of a module that is called a reward."""
    first = [name for name in ("success", "episodes.return", "reward") if name in series]
    measured = tuple(f"{root}." for root in (*_MEASURED, *_roots(series)))
    others = [
        name for name in series if _BEHAVIOUR.search(name) and not name.startswith(measured) and not measure(name)
    ]
    return list(dict.fromkeys([*first, *others]))


def _roots(series: Mapping[str, Series]) -> list[str]:
    """The roots of results: for each there is a share of rows that were computed."""
    return [name.removeprefix("computed.") for name in series if name.startswith("computed.")]


def features_of(series: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """For each attribution its features: ``attr.observation.NAME``."""
    heads = sorted((name for name in series if name.startswith("attr.")), key=len)
    found: dict[str, dict[str, Series]] = {}
    for head in heads:
        if any(head.startswith(f"{other}.") for other in found):
            continue
        inner = {name[len(head) + 1 :]: series[name] for name in heads if name.startswith(f"{head}.")}
        found[head] = inner
    return {head: inner for head, inner in found.items() if inner}


def masses_of(series: Mapping[str, Series], logged: Mapping[str, Series] | None = None) -> dict[str, dict[str, Series]]:
    """For each input the share of attribution in each group: ``mass.observation.NAME``, or of each of several methods.

    Both may hold dots: the inputs are those of which there is an attribution in ``logged``, all numbers of the run.
    """
    known = series if logged is None else logged
    roots = [f"{root}." for root in ("attr", *_roots(known))]
    named = [(name, one) for one in roots for name in known if name.startswith(one)]
    inputs = sorted((part for name, one in named for part in (name.removeprefix(one), name)), key=len)
    found: dict[str, dict[str, Series]] = {}
    for name, curve in series.items():
        rest = name.removeprefix("mass.")
        head = next((one for one in inputs if rest.startswith(f"{one}.")), rest.rpartition(".")[0])
        if name.startswith("mass.") and head:
            found.setdefault(head, {})[rest[len(head) + 1 :]] = curve
    return found


def last(curve: Series) -> float:
    """The last value that is finite; NaN without one."""
    return next((value for _, value in reversed(curve) if math.isfinite(value)), math.nan)


def first(curve: Series) -> float:
    """The first value that is finite; NaN without one."""
    return next((value for _, value in curve if math.isfinite(value)), math.nan)
