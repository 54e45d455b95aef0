"""The curves of runs as small figures, by subject: what it achieves, knows, looks at; activations, health, the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdhook_rl.report.contents.answer import part
from tdhook_rl.report.contents.names import behaviour_of, features_of, last, masses_of, probes_of
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import grouped_bars, lines, probe_curves, seed_curves
from tdhook_rl.report.page import Section
from tdhook_rl.report.runs import Run
from tdhook_rl.report.runs.record import Series

#: Figures of a page, lines of a figure, points of a line, concepts of a probe figure, features.
MOST, LINES, POINTS, CONCEPTS, FEATURES = 36, 5, 400, 4, 12
#: Curves whose sizes differ by more stand on axes of their own.
APART = 30.0
ACHIEVES, KNOWS, LOOKS, ACTIVE, HEALTH, CONTROLS, OTHER = (
    "What it achieves", "What it knows, and when", "What it looks at", "Activations", "Health of the network",
    "What controls were set to", "Other numbers",
)  # fmt: skip
_NOT_DRAWN = ("computed.", "nonfinite.", "final.")
_HEALTH = ("dormant", "dead", "effective_rank", "entropy_rank", "norm", "cka_first", "churn", "kl_churn")
_UNITS = {
    "dormant": "share of units",
    "dead": "share of units",
    "effective_rank": "dimensions",
    "zero": "share of zeros",
}


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: labels and the names of their series."""

    section: str
    title: str
    names: Mapping[str, str]


def sections_of(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The figures of some runs, by subject; and what is not drawn."""
    several = len(runs) > 1
    series = {name: curve for run in runs for name, curve in run.series.items()}
    drawn: dict[str, list[Drawing]] = {}
    left = 0
    for section, make in _jobs(runs, series, several):
        if sum(map(len, drawn.values())) >= MOST:
            left += 1
            continue
        drawn.setdefault(section, []).append(make())
    said = []
    if left:
        said.append(
            f"{MOST} figures are drawn; {left:,} more groups of numbers are in the table of all numbers and in the log"
        )
    return [Section(name, [drawings]) for name, drawings in drawn.items()], said


Job = tuple[str, Callable[[], Drawing]]


def _jobs(runs: Sequence[Run], series: Mapping[str, Series], several: bool) -> Iterator[Job]:
    """What is to be drawn, the most telling first."""
    axis = _axis(runs[0])
    panels = panels_of(series, several)
    of = {section: [one for one in panels if one.section == section] for section in dict.fromkeys(
        one.section for one in panels)}  # fmt: skip
    for section in (ACHIEVES, KNOWS, LOOKS, HEALTH, ACTIVE, CONTROLS, OTHER):
        if section == KNOWS and not several:
            yield from _probe_jobs(runs[0], axis)
            continue
        if section == LOOKS and not several:
            yield from _feature_jobs(runs[0])
        for panel in of.get(section, []):
            if several:
                for label, name in panel.names.items():
                    title = panel.title if len(panel.names) == 1 else f"{panel.title}: {label}"
                    yield section, lambda name=name, title=title: _of_seeds(runs, name, title, axis)
            else:
                yield section, lambda panel=panel: _lines(runs[0], panel, axis)


def panels_of(series: Mapping[str, Series], several: bool) -> list[Panel]:
    """Which curves stand together."""
    waiting = {
        name: curve for name, curve in series.items()
        if not name.startswith(_NOT_DRAWN) and any(math.isfinite(value) for _, value in curve)
    }  # fmt: skip
    for name in ("states", "episodes.ended"):  # how much was looked at
        waiting.pop(name, None)
    found: list[Panel] = []

    def take(section: str, title: str, names: Mapping[str, str], split: bool = False) -> None:
        there = {label: name for label, name in names.items() if name in waiting}
        groups = _split(there, waiting) if split else [there] if there else []
        for group in groups:
            apart = title if len(groups) == 1 else f"{title}: {', '.join(group)}"
            found.append(Panel(section, apart, group))
        for name in names.values():
            waiting.pop(name, None)

    for name in behaviour_of(waiting)[:4]:
        take(ACHIEVES, name, {name: name})
    for probe in probes_of(series).values():
        take(KNOWS, f"Probe of {probe.name}: held-out {probe.score}", {probe.name: _name_of(series, probe.main)})
    for name in [name for name in waiting if name.startswith("probe.")]:
        waiting.pop(name)  # limits, counts and controls
    for head, masses in masses_of(waiting).items():
        ranked = sorted(masses, key=lambda name, masses=masses: -_or_zero(last(masses[name])))[:LINES]
        take(LOOKS, f"Share of the attribution of {head}", {one: f"mass.{head}.{one}" for one in ranked})
        for one in masses:
            waiting.pop(f"mass.{head}.{one}", None)
    for head, inner in features_of(waiting).items():
        take(LOOKS, f"Mean |attribution| of {head.removeprefix('attr.')}", {head: head})
        for feature in inner:
            waiting.pop(f"{head}.{feature}", None)
    for name in [name for name in waiting if name.startswith("attr.")]:
        take(LOOKS, f"Mean |attribution| of {name.removeprefix('attr.')}", {name: name})
    for kind in _HEALTH:
        names = {re.sub(rf"^{kind}[./]?", "", name) or kind: name for name in waiting
                 if name == kind or name.startswith((f"{kind}.", f"{kind}/"))}  # fmt: skip
        if names:
            unit = f" ({_UNITS[kind]})" if kind in _UNITS else ""
            take(HEALTH, f"{kind.replace('_', ' ').capitalize()}{unit}", names, split=True)
    sites = [name for name in waiting if f"{name}.std" in waiting and f"{name}.mean" in waiting]
    for site in sites:
        statistics = {one: f"{site}.{one}" for one in ("mean", "std", "max")}
        take(ACTIVE, f"Activations of {site.removeprefix('cache.')}", {"mean |.|": site, **statistics}, split=True)
        take(ACTIVE, f"Share of zeros at {site.removeprefix('cache.')}", {"zero": f"{site}.zero"})
    controls = {name.removeprefix("control."): name for name in waiting if name.startswith("control.")}
    take(CONTROLS, "Controls", controls, split=True)
    rest: dict[str, dict[str, str]] = {}
    for name in waiting:
        head, _, label = re.sub(r"[./]([^./]*)$", r"\0\1", name).rpartition("\0")
        rest.setdefault(head, {})[label] = name
    for head, names in rest.items():
        take(OTHER, head or "Numbers", names, split=True)
    return found


def _name_of(series: Mapping[str, Series], curve: Series) -> str:
    return next(name for name, one in series.items() if one is curve)


def _split(names: Mapping[str, str], series: Mapping[str, Series]) -> list[dict[str, str]]:
    """Groups of a few curves of about one size."""
    sizes = {label: max((abs(value) for _, value in series[name] if math.isfinite(value)), default=0.0)
             for label, name in names.items()}  # fmt: skip
    found: list[dict[str, str]] = []
    for label in sorted(names, key=lambda one: -sizes[one]):
        group = found[-1] if found else {}
        largest = max((sizes[one] for one in group), default=0.0)
        if not group or len(group) >= LINES or (sizes[label] and largest / sizes[label] > APART):
            found.append({})
        found[-1][label] = names[label]
    return found


def thinned(curve: Sequence[Any]) -> list[Any]:
    """So many points as a figure shows, evenly spaced, the last among them."""
    if len(curve) <= POINTS:
        return list(curve)
    return [curve[round(place * (len(curve) - 1) / (POINTS - 1))] for place in range(POINTS)]


def _lines(run: Run, panel: Panel, axis: str) -> Drawing:
    curves = {label: thinned(run.series[name]) for label, name in panel.names.items()}
    return lines(curves, unit=_unit(panel), axis=axis, title=panel.title, caption=_thin(curves, run, panel))


def _thin(curves: Mapping[str, Sequence[Any]], run: Run, panel: Panel) -> str:
    whole = max(len(run.series[name]) for name in panel.names.values())
    shown = max(map(len, curves.values()))
    if whole == 1:
        return "One point only was logged."
    return f"{shown:,} of {whole:,} points are drawn." if shown < whole else ""


def _unit(panel: Panel) -> str:
    return next(iter(panel.names)) if len(panel.names) == 1 else panel.title


def _probe_jobs(run: Run, axis: str) -> Iterator[Job]:
    probes = probes_of(run.series)
    ranked = sorted(probes, key=lambda name: -_or_zero(last(probes[name].main)))
    names = {"input": "input", "shuffled": "shuffled labels", "untrained": "untrained"}
    behaviour = behaviour_of(run.series)[:1]
    for start in range(0, len(ranked), CONCEPTS):
        chosen = ranked[start : start + CONCEPTS]
        concepts = {
            name: {"trained": thinned(probes[name].curve())}
            | {names[one]: thinned(curve) for one, curve in probes[name].controls.items()}
            for name in chosen
        }
        acts = {name: thinned(run.series[name]) for name in behaviour}
        score = probes[chosen[0]].score
        yield (
            KNOWS,
            lambda concepts=concepts, acts=acts, score=score: probe_curves(
                concepts, acts, chance=None, unit=f"held-out {score}", axis=axis, title=", ".join(concepts)
            ),
        )


def _feature_jobs(run: Run) -> Iterator[Job]:
    for head, inner in features_of(run.series).items():
        groups = {}
        for name, curve in inner.items():
            end, start = part(curve, True), part(curve, False)
            if end is not None and start is not None:
                groups[name] = {"last batches": end, "first batches": start}
        if groups:
            name = head.removeprefix("attr.")
            yield (
                LOOKS,
                lambda groups=groups, name=name: grouped_bars(
                    groups, unit="mean |attribution|", title=f"Features of {name}", most=FEATURES, of="batches"
                ),
            )


def _of_seeds(runs: Sequence[Run], name: str, title: str, axis: str) -> Drawing:
    curves = {run.name: thinned(run.series[name]) for run in runs if name in run.series}
    return seed_curves(curves, unit=name, axis=axis, title=title)


def _axis(run: Run) -> str:
    return "environment frames" if run.axis == "frames" else run.axis


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
