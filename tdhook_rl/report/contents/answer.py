"""What a run has found, from its numbers: effect sizes with intervals, each beside its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, median

from tdhook_rl.report.contents.logged_tables import chances_of
from tdhook_rl.report.contents.names import (
    LARGEST,
    ProbeSeries,
    behaviour_of,
    features_of,
    first,
    last,
    masses_of,
    probes_of,
)
from tdhook_rl.report.page import Finding
from tdhook_rl.report.page.numbers import frames, number
from tdhook_rl.report.runs import Run
from tdhook_rl.report.runs.record import Series
from tdhook_rl.report.sweep_pages import chosen_outcomes, sweep_findings
from tdhook_rl.statistics import Interval, grouped_mean

#: The share of batches at the end, and at the beginning, that are taken together; and how many answers of a kind.
PART, MOST = 0.1, 8


def findings_of(run: Run) -> list[Finding]:
    """The answers, those that the run has written down first."""
    if run.findings:
        return run.findings
    if run.sweep is not None:
        return sweep_findings(run.sweep, *chosen_outcomes(run.sweep))
    found = [_behaviour(run, name) for name in behaviour_of(run.series)[:2]]
    probes = sorted(probes_of(run.series).values(), key=lambda one: -_or(last(one.main), -math.inf))
    chances = chances_of(run)
    found += [_probe(one, chances.get(one.name)) for one in probes[:MOST]]
    found += [one for head, groups in masses_of(run.series).items() for one in _masses(head, groups)][:MOST]
    found += [_features(head, inner) for head, inner in features_of(run.series).items()][:MOST]
    found += _health(run)[:MOST]
    return [one for one in found if one is not None]


def part(curve: Series, at_end: bool) -> Interval | None:
    """The mean of the last, or first, tenth of what is finite, by batch."""
    known = _part(curve, at_end)
    return grouped_mean(known, method="t") if known else None


def _part(curve: Series, at_end: bool) -> list[float]:
    known = [value for _, value in curve if abs(value) < LARGEST]
    few = _few(len(known))
    return known[-few:] if at_end else known[:few]


def _ends(curves: Mapping[str, Series]) -> dict[str, float]:
    """The mean at the end of each curve that has one, as of :func:`part`, the largest first."""
    found = {name: mean(known) for name, curve in curves.items() if (known := _part(curve, True))}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _behaviour(run: Run, name: str) -> Finding | None:
    end, start = part(run.series[name], True), part(run.series[name], False)
    if end is None or start is None:
        return None
    known = [step for step, value in run.series[name] if math.isfinite(value)]
    few = _batches(_few(len(known)))
    return Finding(
        question="What does it achieve?",
        measured=f"{name}, at the end",
        value=end,
        beside={"at first": start.estimate} if len(known) > 1 else {},
        words=f"mean of the last {few}, up to {frames(known[-1])} {run.axis}",
    )


def _few(count: int) -> int:
    """How many batches at an end are taken together: a tenth; in short runs three, where the ends stay apart."""
    return max(1, round(count * PART), min(3, count // 2))


def _batches(count: int) -> str:
    return "batch" if count == 1 else f"{count} batches"


def _probe(probe: ProbeSeries, chance: float | None) -> Finding | None:
    value = probe.last
    if value is None:
        return None
    beside = {_named(name): last(curve) for name, curve in probe.controls.items()}
    beside |= {} if chance is None else {"chance": chance}
    beside = {name: one for name, one in beside.items() if math.isfinite(one)}
    low = value.low if value.known else value.estimate
    above = [name for name, one in beside.items() if low <= one]
    if not probe.controls:
        words = "no control was logged beside it: it says little by itself"
    elif not value.known:
        words = "" if not above else f"not above {', '.join(above)}"
    else:
        words = f"its interval is not above {', '.join(above)}" if above else "its interval is above every control"
    groups = f"{value.groups:,} held-out groups" if value.groups > 1 else ""
    return Finding(
        question="What does it know?",
        measured=f"probe of {probe.name}, held-out {probe.score}",
        value=value,
        beside=beside,
        words="; ".join(one for one in (groups, words) if one),
    )


def _named(control: str) -> str:
    return {"input": "the raw input", "shuffled": "shuffled labels", "untrained": "untrained network"}.get(
        control, control
    )


def _masses(head: str, groups: dict[str, Series]) -> list[Finding]:
    ends = _ends(groups)
    if not ends:
        return []
    group, *others = ends
    end, start = part(groups[group], True), mean(_part(groups[group], False))
    beside = {"at first": start} | {name: ends[name] for name in others}
    return [
        Finding(
            question="What does it look at?",
            measured=f"share of the attribution of {head} in {group}, at the end",
            value=end,
            beside=dict(list(beside.items())[:5]),
        )
    ]


def _features(head: str, inner: dict[str, Series]) -> Finding | None:
    ends = _ends(inner)
    if not ends:
        return None
    largest, *others = ends
    beside = {_feature(name): ends[name] for name in others[:2]}
    beside |= {f"the median of {len(ends)} features": median(ends.values())} if len(ends) > 2 else {}
    return Finding(
        question="What does it look at?",
        measured=f"mean |attribution| of {head.removeprefix('attr.')}, its largest feature at the end",
        value=part(inner[largest], True),
        beside=beside,
        words=f"the largest is {_feature(largest)}",
    )


def _feature(name: str) -> str:
    """A feature as it is called; those without a name have their number."""
    return f"feature {name}" if name.isdecimal() else name


def _health(run: Run) -> list[Finding]:
    found = []
    for name, curve in run.series.items():
        kind, _, site = name.partition(".")
        if kind != "dormant" or not math.isfinite(last(curve)):
            continue
        rank = run.series.get(f"effective_rank.{site}", [])
        words = f"effective rank {number(first(rank))} at first, {number(last(rank))} now" if rank else ""
        found.append(
            Finding(
                question="Is the network well?",
                measured=f"share of dormant units at {site}",
                value=last(curve),
                beside={"at first": first(curve)},
                words=words,
            )
        )
    return found


def _or(value: float, other: float) -> float:
    return value if math.isfinite(value) else other
