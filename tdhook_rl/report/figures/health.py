"""The health of a network while it trains: dormant units, ranks, drift and churn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.style import (
    COLOURS,
    GREY,
    MARKERS,
    STYLES,
    Curve,
    Points,
    canvas,
    drawn,
    in_house_style,
    label,
    labels,
    legend,
    number,
    points,
    tick_numbers,
    whole_ticks,
)

#: The measures of ``NetworkDiagnostics``, two in a panel where they belong together: the second is dashed.
_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("share of dormant units", ("dormant", "dead"), True),
    ("effective rank", ("effective_rank", "entropy_rank"), False),
    ("churn: share of states", ("churn",), True),
    ("similarity to the first (CKA)", ("cka_first", "cka_last"), True),
    ("norm of the features", ("norm",), False),
    ("overlap of dormant units", ("overlap_first", "overlap_last"), True),
    ("KL churn (nats)", ("kl_churn",), False),
    ("value drift, relative", ("value_drift_relative",), False),
    ("plasticity loss, relative", ("plasticity_ratio",), False),
)
_SECOND = {
    "dead": "dead units", "entropy_rank": "entropy rank", "cka_last": "similarity to the update before",
    "overlap_last": "overlap with the update before (solid: with the first)",
}  # fmt: skip


@in_house_style
def network_health(
    curves: Mapping[str, Curve],
    *,
    axis: str = "environment frames",
    title: str = "The health of the network",
    caption: str = "",
) -> Drawing:
    """Dormant units, ranks, churn and drift of each site, a panel for each measure.

    Args:
        curves: by name, as of :class:`~tdhook_rl.rollout.NetworkDiagnostics` (``"dormant/module.0"``, ``"churn"``) or
            as they are in a log (``"dormant.module.0"``). Other names are passed over.
        axis: of the steps.
        title: of the drawing.
        caption: what to see; what is dashed is added.

    Raises:
        InputError: if none of the names is a measure.

    Example:
        >>> network_health({"dormant/fc2": [(0, 0.1), (100, 0.4)], "churn": [(100, 0.25)]}).alt
        'At 100: share of dormant units: fc2 0.4; churn: share of states 0.25.'
    """
    found = _sorted(curves)
    if not found:
        measures = ", ".join(one for _, names, _ in _PANELS for one in names)
        raise InputError(f"none of the {len(curves)} curves is a measure of a network: {measures}, of a site")
    panels = [(heading, names, share) for heading, names, share in _PANELS if any(name in found for name in names)]
    sites = list(dict.fromkeys(site for by_site in found.values() for site in by_site if site))
    shown = [*sites[: len(COLOURS)], ""]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = canvas(rows, columns, height=0.6 + 1.45 * rows, sharex=True)
    entries: dict[str, Any] = {}
    called = labels(shown, 28)
    for panel, (heading, names, share) in zip(axes.flat, panels, strict=False):
        for second, name in enumerate(names):
            for place, site in enumerate(shown):
                if site not in found.get(name, {}):
                    continue
                colour = COLOURS[place] if site else GREY
                line = drawn(
                    panel, found[name][site], colour=colour, style=STYLES[second], width=1.8 - 0.5 * second,
                    marker=MARKERS[place % 5] if not second else "",
                )  # fmt: skip
                if site and not second:
                    entries.setdefault(called[place], line)
        panel.set_title(heading, loc="left", pad=3, fontsize=9)
        if share:
            panel.set_ylim(min(-0.04, panel.get_ylim()[0]), 1.04)
        tick_numbers(panel, "y")
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    for column in range(columns):
        last = axes[(len(panels) - 1 - column) // columns, column]
        last.tick_params(labelbottom=True)
        last.set_xlabel(axis, fontsize=9)
        whole_ticks(last)
        tick_numbers(last)
    legend(figure, entries)
    dashed = [_SECOND[name] for _, names, _ in panels for name in names[1:] if name in found]
    words = [caption, f"Dashed: {', '.join(dashed[:-1])}{' and ' if dashed[1:] else ''}{dashed[-1]}." if dashed else ""]
    if len(sites) > len(COLOURS):
        words.append(f"Shown are {len(COLOURS)} of {len(sites)} sites.")
    kept = {name: {site: one for site, one in by.items() if site in shown} for name, by in found.items()}
    return Drawing(
        figure=figure,
        title=title,
        alt=_in_words(kept, panels),
        data={
            "axis": axis,
            "curves": {name: {site: one.data for site, one in by.items()} for name, by in kept.items()},
            "left_out": max(0, len(sites) - len(COLOURS)),
        },
        caption=" ".join(word for word in words if word),
    )


def _sorted(curves: Mapping[str, Curve]) -> dict[str, dict[str, Points]]:
    """By measure and site; a measure without a site has that of no name."""
    found: dict[str, dict[str, Points]] = {}
    measures = "|".join(name for _, names, _ in _PANELS for name in names)
    for name, curve in curves.items():
        parts = re.fullmatch(rf"({measures})(?:[/.](.+))?", name, flags=re.DOTALL)
        if parts is not None:
            found.setdefault(parts[1], {})[parts[2] or ""] = points(curve)
    return found


def _in_words(found: Mapping[str, Mapping[str, Points]], panels: list[tuple[str, tuple[str, ...], bool]]) -> str:
    told, ends = [], []
    for heading, names, _ in panels:
        first = found.get(names[0], {})
        values = []
        for site, one in first.items():
            at, value = one.last
            ends.append(at)
            values.append(f"{label(site, 60)} {value}" if site else value)
        if values:
            told.append(f"{heading}{':' if any(first) else ''} {', '.join(values)}")
    last = max((one for one in ends if np.isfinite(one)), default=float("nan"))
    return f"At {number(last)}: {'; '.join(told)}."
