"""What can be read from a network while it trains, under what the agent does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    STYLES,
    Curve,
    Points,
    beside,
    canvas,
    drawn,
    in_house_style,
    label,
    labels,
    legend,
    number,
    points,
    resting,
    tick_numbers,
    whole_ticks,
)

#: Who is read: colour, line and marker. Others take what is left.
_SERIES = {
    "trained": (BLUE, STYLES[0], MARKERS[0], 1.8),
    "untrained": (GREY, STYLES[1], MARKERS[1], 1.4),
    "shuffled labels": (PURPLE, STYLES[2], MARKERS[2], 1.4),
    "input": (ORANGE, STYLES[3], MARKERS[3], 1.4),
}


@in_house_style
def probe_curves(
    concepts: Mapping[str, Mapping[str, Curve]],
    behaviour: Mapping[str, Curve] | None = None,
    *,
    chance: float | Mapping[str, float] | None = 0.5,
    unit: str = "held-out accuracy",
    axis: str = "environment frames",
    most: int = 4,
    title: str = "What it knows, and when",
    of: str = "groups",
    caption: str = "",
) -> Drawing:
    """For each concept how well probes read it as the agent trains, with their controls, under its behaviour.

    Args:
        concepts: curves by concept and by what was read: ``"trained"``, ``"untrained"``, ``"shuffled labels"``,
            ``"input"``. A curve is pairs of a step and a number or :class:`~tdhook_rl.statistics.Interval`, or rows of
            a step, a value and its limits.
        behaviour: one curve by its name, ``{"success": ...}``.
        chance: the score that says nothing, of all concepts or by concept.
        unit: of the scores.
        axis: of the steps.
        most: how many concepts are shown: of more, those that are read best at the end.
        title: of the drawing.
        of: what the intervals are over, ``"episodes"``.
        caption: what to see; what the intervals rest on is added.

    Raises:
        InputError: without a curve; for something read that has no line of its own; for rows that are no points.

    Example:
        >>> found = probe_curves({"xor": {"trained": [(0, 0.5), (80_000, 0.98, 0.96, 0.99)], "untrained": [(0, 0.51)]}})
        >>> found.alt
        'The probe of xor reads 0.98 (0.96 to 0.99) at 80k; untrained 0.51; chance 0.5.'
    """
    unknown = {name for curves in concepts.values() for name in curves} - set(_SERIES)
    if unknown or not any(concepts.values()):
        raise InputError(
            f"a concept has curves of {', '.join(map(repr, _SERIES))}; got "
            f"{repr(sorted(unknown)[0]) if unknown else 'none'}"
        )
    found = {name: {one: points(curve) for one, curve in curves.items()} for name, curves in concepts.items()}
    shown = list(found)
    if len(found) > most:
        shown = sorted(found, key=lambda name: -_end(found[name]))[:most]
    acts = {name: points(curve) for name, curve in (behaviour or {}).items()}
    chances = dict.fromkeys(shown, chance) if not isinstance(chance, Mapping) else chance
    rows = len(shown) + bool(acts)
    ratios = [0.75] * bool(acts) + [1.0] * len(shown)
    figure, axes = canvas(rows, 1, height=0.9 + 1.3 * sum(ratios), sharex=True, height_ratios=ratios)
    entries: dict[str, Any] = {}
    for name, curve in acts.items():
        drawn(axes[0, 0], curve, colour=GREEN, marker=MARKERS[4])
        axes[0, 0].set_title(label(name, 60), loc="left", pad=3)
    _shares(axes[: bool(acts), 0], acts.values())
    for panel, name, called in zip(axes[bool(acts) :, 0], shown, labels(shown, 40), strict=True):
        for one, (colour, style, marker, width) in _SERIES.items():
            if one in found[name]:
                line = drawn(panel, found[name][one], colour=colour, style=style, marker=marker, width=width)
                entries.setdefault(one, line)
        if chances.get(name) is not None:
            entries.setdefault("chance", panel.axhline(chances[name], color=INK, linewidth=0.9, linestyle=(0, (1, 3))))
        panel.set_title(f"{called}: {unit}", loc="left", pad=3)
    everything = [curve for name in shown for curve in found[name].values()]
    _shares(axes[bool(acts) :, 0], everything, [chances.get(name) for name in shown])
    axes[-1, 0].set_xlabel(axis)
    whole_ticks(axes[-1, 0])
    tick_numbers(axes[-1, 0])
    legend(figure, entries)
    counts = [one for name in shown for curve in found[name].values() for one in curve.groups]
    words = [caption, resting(counts, of)]
    if len(found) > len(shown):
        words.append(f"Shown are {len(shown)} of {len(found):,} concepts, those that are read best at the end.")
    return Drawing(
        figure=figure,
        title=title,
        alt=_in_words({name: found[name] for name in shown}, acts, chances, len(found)),
        data={
            "axis": axis,
            "unit": unit,
            "behaviour": {name: curve.data for name, curve in acts.items()},
            "concepts": {name: {one: curve.data for one, curve in found[name].items()} for name in shown},
            "chance": {name: chances.get(name) for name in shown},
            "left_out": len(found) - len(shown),
        },
        caption=" ".join(word for word in words if word),
    )


def fill_probes(
    axis: Any,
    concepts: Mapping[str, Mapping[str, Curve]],
    behaviour: Mapping[str, Curve] | None = None,
    *,
    chance: float | None,
    unit: str,
    steps: str,
) -> dict[str, Any]:
    """All concepts in one panel, a colour for each and a line for who is read; returns the entries of a legend."""
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    others: dict[str, Any] = {}
    called = labels([*concepts, *(behaviour or {})], 34, taken=[*_SERIES, "chance"])
    looks = zip(called, concepts.values(), (BLUE, ORANGE, PURPLE, GREY), MARKERS, strict=False)
    for name, curves, colour, marker in looks:
        for one, curve in curves.items():
            _, style, _, width = _SERIES[one]
            line = drawn(
                axis, points(curve), colour=colour, style=style, marker=marker if one == "trained" else "", width=width
            )
            if one == "trained":
                entries[name] = line
            else:
                others[one] = Line2D([], [], color=INK, linestyle=style, linewidth=width)
    entries |= others
    for name, curve in zip(called[len(concepts) :], (behaviour or {}).values(), strict=True):
        entries[name] = drawn(axis, points(curve), colour=GREEN, style=STYLES[2], marker=MARKERS[4], width=1.4)
    if chance is not None:
        entries["chance"] = axis.axhline(chance, color=INK, linewidth=0.9, linestyle=(0, (1, 3)))
    axis.set(xlabel=steps, ylabel=beside(unit))
    everything = [curve for curves in (*concepts.values(), behaviour or {}) for curve in curves.values()]
    _shares([axis], map(points, everything), [chance])
    whole_ticks(axis)
    tick_numbers(axis)
    return entries


def _end(curves: Mapping[str, Points]) -> float:
    known = [curve.y[np.isfinite(curve.y)] for curve in curves.values()]
    return float(known[0][-1]) if len(known[0]) else -np.inf


def _shares(axes: Iterable[Any], curves: Iterable[Points], chances: Iterable[float | None] = ()) -> None:
    """The same limits for all panels: up to 1, and down to what is lowest, where all are shares."""
    sides = [side for curve in curves for side in (curve.y, curve.low, curve.high)]
    values = np.concatenate([*sides, np.array([one for one in chances if one is not None], dtype=float)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() >= -1e-6 and values.max() <= 1 + 1e-6:
        lowest = np.floor(values.min() * 10 - 0.3) / 10 if values.min() > 0.25 else -0.04
        for axis in axes:
            axis.set_ylim(lowest, 1.04)


def _in_words(
    found: Mapping[str, Mapping[str, Points]],
    behaviour: Mapping[str, Points],
    chances: Mapping[str, float | None],
    total: int,
    most: int = 6,
) -> str:
    parts = [f"{label(name, 60)} ends at {curve.last[1]}." for name, curve in behaviour.items()]
    for name, curves in list(found.items())[:most]:
        told: list[str] = []
        for one, curve in curves.items():
            at, value = curve.last
            first = f"The probe of {label(name, 60)} reads {value} at {number(at)}"
            told.append(first if not told and one == "trained" else f"{one} {value}")
        if chances.get(name) is not None:
            told.append(f"chance {number(float(chances[name]))}")
        text = "; ".join(told)
        parts.append(f"{text if 'trained' in curves else f'Probes of {label(name, 60)}: {text}'}.")
    if total > min(len(found), most):
        parts.append(f"{total - min(len(found), most):,} more concepts.")
    return " ".join(parts)
