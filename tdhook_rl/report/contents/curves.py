"""The curves of runs as small figures, by subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tdhook_rl.report.contents.answer import part
from tdhook_rl.report.contents.logged_tables import chances_of, drawn_tables
from tdhook_rl.report.contents.names import LARGEST, behaviour_of, features_of, last, measure, probes_of
from tdhook_rl.report.contents.panels import (
    ACHIEVES,
    INSIDE,
    KNOWS,
    LOOKS,
    SUBJECTS,
    Panel,
    or_zero,
    panels_of,
)
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import (
    grouped_bars,
    histograms_over_time,
    lines,
    network_health,
    probe_curves,
    seed_curves,
)
from tdhook_rl.report.page import Section
from tdhook_rl.report.runs import Run
from tdhook_rl.report.runs.record import Series

#: Figures of a page, points of a line, concepts of a probe figure, features.
MOST, POINTS, CONCEPTS, FEATURES = 36, 400, 4, 12
#: Beyond this an axis has no ticks.
_LARGEST_STEP = 1e18
#: The subject of dose-responses.
STEERS = "What steering does"
#: Names of the controls of probes in figures.
_CONTROLS = {"input": "input", "shuffled": "shuffled labels", "untrained": "untrained"}

#: The subject of a figure, and what draws it.
Job = tuple[str, Callable[[], Drawing]]


def sections_of(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The figures of some runs, by subject; and what is not drawn."""
    drawn: dict[str, list[Drawing]] = {}
    left, said = 0, []
    jobs = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    for subject, make in jobs:
        if sum(map(len, drawn.values())) >= MOST:
            left += 1
            continue
        try:
            drawing = make()
        except Exception as error:  # whatever odd numbers make of it
            said.append(f"{subject}: a figure cannot be drawn ({type(error).__name__}: {str(error)[:200]})")
        else:
            drawn.setdefault(subject, []).append(drawing)
    if ACHIEVES in drawn and KNOWS in drawn:
        drawn = {f"{ACHIEVES}, and what it knows": drawn.pop(ACHIEVES) + drawn.pop(KNOWS)} | drawn
    if left:
        more = f"{left:,} more groups of numbers are in the table of all numbers and in the log"
        said.append(f"{MOST} figures are drawn; {more}")
    return [Section(name, [drawings]) for name, drawings in drawn.items()], said


def thinned(curve: Sequence[Any]) -> list[Any]:
    """So many points as a figure shows, evenly spaced, the last among them; numbers that no axis has are NaN.

    Example:
        >>> points = thinned([(step, 0.5) for step in range(1000)])
        >>> len(points), points[-1], thinned([(0, 1e300), (1, 2.0)])
        (400, (999, 0.5), [(0, nan), (1, 2.0)])
    """
    if len(curve) > POINTS:
        curve = [curve[round(place * (len(curve) - 1) / (POINTS - 1))] for place in range(POINTS)]
    return [
        (step, *(value if abs(value) < LARGEST else math.nan for value in values))
        for step, *values in curve
        if abs(step) < _LARGEST_STEP
    ]


# ------------------------------------------------------------------ one run


def _of_one(run: Run) -> Iterator[Job]:
    axis, panels = _axis(run), panels_of(run.series)
    special = {KNOWS: _probes, LOOKS: _features, INSIDE: _health}
    for subject in SUBJECTS:
        if subject in special:
            yield from special[subject](run, axis)
        for panel in panels if subject != KNOWS else ():
            names = list(panel.names.values())
            if panel.subject == subject and not (subject == INSIDE and measure(names[0])):
                yield subject, lambda panel=panel: _lines(run, panel, axis)
        if subject == INSIDE:
            yield from _histograms(run, axis)
            yield from ((STEERS, make) for about, make in drawn_tables(run) if about == "doses")
        if subject == KNOWS:
            yield from ((KNOWS, make) for about, make in drawn_tables(run) if about == "probes")


def _lines(run: Run, panel: Panel, axis: str) -> Drawing:
    curves = {label: thinned(run.series[name]) for label, name in panel.names.items()}
    whole, shown = max(len(run.series[name]) for name in panel.names.values()), max(map(len, curves.values()))
    words = f"{shown:,} of {whole:,} points are drawn." if shown < whole else ""
    unit = next(iter(panel.names.values())) if len(panel.names) == 1 else panel.title
    caption = "One point only was logged." if whole == 1 else words
    return lines(curves, unit=unit, axis=axis, title=panel.title, caption=caption)


def _probes(run: Run, axis: str) -> Iterator[Job]:
    probes, chances = probes_of(run.series), chances_of(run)
    ranked = sorted(probes, key=lambda name: -or_zero(last(probes[name].main)))
    acts = {name: thinned(run.series[name]) for name in behaviour_of(run.series)[:1]}
    for start in range(0, len(ranked), CONCEPTS):
        chosen = {name: probes[name] for name in ranked[start : start + CONCEPTS]}
        concepts = {
            name: {"trained": thinned(one.curve())}
            | {_CONTROLS[control]: thinned(curve) for control, curve in one.controls.items()}
            for name, one in chosen.items()
        }
        score = next(iter(chosen.values())).score
        chance = {name: chances[name] for name in chosen if name in chances}
        options = {
            "chance": chance,
            "unit": f"held-out {score}",
            "axis": axis,
            "title": f"Probes of {', '.join(chosen)}",
        }
        yield KNOWS, lambda concepts=concepts, options=options: probe_curves(concepts, acts, **options)


def _features(run: Run, axis: str) -> Iterator[Job]:
    for head, inner in features_of(run.series).items():
        groups = {}
        for name, curve in inner.items():
            end, start = part(curve, True), part(curve, False)
            if end is not None and start is not None:
                groups[name] = {"last batches": end, "first batches": start}
        options = {"unit": "mean |attribution|", "title": f"Features of {head.removeprefix('attr.')}", "of": "batches"}
        if groups:
            yield LOOKS, lambda groups=groups, options=options: grouped_bars(groups, most=FEATURES, **options)


def _health(run: Run, axis: str) -> Iterator[Job]:
    curves = {name: thinned(curve) for name, curve in run.series.items() if measure(name)}
    if curves:
        yield INSIDE, lambda: network_health(curves, axis=axis)


def _histograms(run: Run, axis: str) -> Iterator[Job]:
    for name, listed in run.histograms.items():
        records = [
            {"step": one.step, "counts": one.counts, "edges": one.edges}
            for one in listed
            if one.counts.sum() > 0
            and max(abs(one.edges[0]), abs(one.edges[-1])) < LARGEST
            and abs(one.step) < _LARGEST_STEP
        ]
        unit = "attribution" if "attr." in name else "activation"
        options = {"unit": unit, "axis": axis, "title": f"Distribution of {name.removeprefix('hist.')}"}
        if records:
            yield INSIDE, lambda records=records, options=options: histograms_over_time(records, **options)


# ------------------------------------------------------------------ several runs


def _of_several(runs: Sequence[Run]) -> Iterator[Job]:
    axis = _axis(runs[0])
    series: Mapping[str, Series] = {name: curve for run in runs for name, curve in run.series.items()}
    panels = panels_of(series)
    for subject in SUBJECTS:
        for panel in panels:
            for label, name in panel.names.items() if panel.subject == subject else ():
                title = panel.title if len(panel.names) == 1 else f"{panel.title.split(': ')[0]}: {label}"
                curves = {run.name: thinned(run.series[name]) for run in runs if name in run.series}
                some = f"It was logged in {len(curves)} of {len(runs)} runs." if len(curves) < len(runs) else ""
                options = {"unit": name, "axis": axis, "title": title, "caption": some}
                yield subject, lambda curves=curves, options=options: seed_curves(curves, **options)


def _axis(run: Run) -> str:
    return "environment frames" if run.axis == "frames" else run.axis
