"""Bars with intervals: which features matter, beside what they are compared with and what is true."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    COLOURS,
    GREY,
    WIDTH,
    Number,
    canvas,
    hollow,
    in_house_style,
    label,
    labels,
    legend,
    limits,
    number,
    resting,
    said,
    tick_numbers,
)
from tdhook_rl.statistics import Interval

#: What the others are compared with is an outline.
_ROLES = {"untrained": GREY, "random": GREY, "chance": GREY}


@in_house_style
def grouped_bars(
    groups: Mapping[str, Mapping[str, Number]],
    *,
    unit: str,
    title: str = "",
    truth: Mapping[str, Number] | None = None,
    matters: Collection[str] = (),
    most: int = 24,
    of: str = "groups",
    caption: str = "",
) -> Drawing:
    """For each feature (layer, condition) a bar of each series, with its interval where there is one.

    Args:
        groups: for each feature, in the order in which they are shown, its number or
            :class:`~tdhook_rl.statistics.Interval` by series: ``{"light 1": {"trained": 4.1, "untrained": 0.02}}``.
        unit: what the numbers are, ``"mean |gradient| of the chosen logit"``.
        title: of the drawing; the unit unless given.
        truth: the true number of each feature, where it is known.
        matters: features that are known to matter; they are marked.
        most: how many features are shown: of more, those with the largest numbers (and all that matter, first).
        of: what the intervals are over, ``"episodes"``.
        caption: what to see; what the intervals rest on is added.

    Raises:
        InputError: without a feature, for more than five series, or for names in ``truth`` or ``matters`` that are no
            features.

    Example:
        >>> bars = grouped_bars({"light 1": {"trained": 4.1, "untrained": 0.02}}, unit="mean |gradient|")
        >>> bars.alt
        'mean |gradient|. Trained: light 1 4.1. Untrained: light 1 0.02.'
    """
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    if not series:
        raise InputError("there are no bars to draw: no feature has a number")
    if len(series) > len(COLOURS):
        raise InputError(f"at most {len(COLOURS)} series can be told apart, got {len(series)}: {', '.join(series)}")
    for what, names in (("truth", truth or ()), ("matters", matters)):
        unknown = [name for name in names if name not in groups]
        if unknown:
            raise InputError(f"{what}= names {unknown[0]!r}, which is none of the features")
    shown = _largest(groups, truth or {}, set(matters), most)
    height = 0.7 + len(shown) * (0.1 + 0.17 * max(len(series), 1.5 if len(shown) < 6 else 1))
    figure, axes = canvas(height=height)
    true = None if truth is None else {name: truth[name] for name in shown if name in truth}
    entries = fill_bars(axes[0, 0], {name: groups[name] for name in shown}, unit=unit, truth=true, matters=matters)
    legend(figure, entries)
    intervals = [one for name in shown for one in groups[name].values() if isinstance(one, Interval) and one.known]
    left_out = len(groups) - len(shown)
    words = [caption, resting((one.groups for one in intervals), of)]
    if left_out:
        words.append(f"Shown are {len(shown)} of {len(groups):,} features, those with the largest numbers.")
    return Drawing(
        figure=figure,
        title=title or unit,
        alt=_in_words(groups, shown, series, unit, matters),
        data={
            "unit": unit,
            "bars": {name: dict(groups[name]) for name in shown},
            "truth": true,
            "matters": [name for name in shown if name in matters],
            "left_out": left_out,
        },
        caption=" ".join(word for word in words if word),
    )


def fill_bars(
    axis: Any,
    groups: Mapping[str, Mapping[str, Number]],
    *,
    unit: str,
    truth: Mapping[str, Number] | None = None,
    matters: Collection[str] = (),
) -> dict[str, Any]:
    """Draw the bars, the first feature on top; returns the entries of a legend."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    entries: dict[str, Any] = {}
    thick = 0.8 / len(series)
    places = np.arange(len(groups), dtype=float)
    free = [colour for colour in COLOURS if colour not in {_ROLES.get(name) for name in series}]
    few, longest = len(series) * len(groups) <= 12, 0
    called = labels(series, taken=["truth", "matters"])
    for place, name in enumerate(series):
        values = np.array([limits(of.get(name)) for of in groups.values()])
        at = places + (place - (len(series) - 1) / 2) * thick
        colour = _ROLES.get(name) or free.pop(0)
        face = "none" if name in _ROLES else colour
        drawn = axis.barh(
            at, np.nan_to_num(values[:, 0]), height=thick * 0.86, facecolor=face, edgecolor=colour, linewidth=1.2
        )
        entries[called[place]] = drawn
        known = np.isfinite(values).all(1)
        if known.any():
            spread = np.abs(values[known, 1:] - values[known, :1]).T
            axis.errorbar(values[known, 0], at[known], xerr=spread, fmt="none", color=INK, elinewidth=1.1, capsize=2.5)
        if few:
            for y, (value, low, high) in zip(at, values, strict=True):
                end = np.nanmax([0.0, value, high]) if value >= 0 else np.nanmin([0.0, value, low])
                side = "left" if not value < 0 else "right"
                text = number(float(f"{value:.{3 if abs(value) >= 1 else 2}g}"))
                longest = max(longest, len(text) if np.isfinite(value) else 0)
                axis.annotate(
                    text, (end if np.isfinite(end) else 0.0, y), (4 if side == "left" else -4, 0), ha=side,
                    textcoords="offset points", va="center_baseline", fontsize=9,
                )  # fmt: skip
    if truth:
        rows = {name: row for row, name in enumerate(groups) if name in truth}
        axis.scatter([float(truth[name]) for name in rows], list(rows.values()), marker="D", s=26, color=INK, zorder=4)
        entries["truth"] = hollow("D")
    if matters:
        entries["matters"] = hollow("o")
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(
        places, [("● " if name in matters else "") + one for name, one in zip(groups, labels(groups), strict=True)]
    )
    axis.set(xlabel=label(unit, 48), ylim=(len(groups) - 0.5, -0.5))
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    if few:
        # Room for the longest number at either end: names stand at the left of the axis.
        share = (4 + 5.4 * longest) / (72 * 0.6 * WIDTH)
        axis.margins(x=max(0.14, share / (1 - 2 * share)))
    tick_numbers(axis)
    return entries if len(entries) > 1 else {}


def _largest(
    groups: Mapping[str, Mapping[str, Number]], truth: Mapping[str, Number], matters: set[str], most: int
) -> list[str]:
    names = list(groups)
    if len(names) <= most:
        return names
    sizes = {
        name: np.nanmax([0.0, *(abs(float(one)) for one in [*of.values(), truth.get(name, 0.0)])])
        for name, of in groups.items()
    }
    ranked = sorted(names, key=lambda name: (name not in matters, -sizes[name]))
    chosen = set(ranked[:most])
    return sorted(chosen, key=lambda name: -sizes[name])


def _in_words(
    groups: Mapping[str, Mapping[str, Number]],
    shown: Sequence[str],
    series: Sequence[str],
    unit: str,
    matters: Collection[str],
    most: int = 6,
) -> str:
    parts = [label(unit, 120)]
    for one in series:
        known = [name for name in shown if one in groups[name]]
        first = sorted(known, key=lambda name: -abs(np.nan_to_num(float(groups[name][one]))))[:most]
        told = ", ".join(f"{label(name, 60)} {said(groups[name][one])}" for name in known if name in first)
        rest = f" (the {most} largest of {len(groups):,})" if len(groups) > most else ""
        parts.append(f"{label(one)[:1].upper()}{label(one)[1:]}{rest}: {told}")
    if matters:
        parts.append("Known to matter: " + ", ".join(label(name, 60) for name in matters))
    return ". ".join(parts) + "."
