"""Which curves of a run stand together on one axis, and under which subject."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tdhook_rl.report.contents.names import (
    HEALTH,
    behaviour_of,
    features_of,
    last,
    masses_of,
    measure,
    probes_of,
)
from tdhook_rl.report.runs.record import Series

#: Lines of a figure; and curves whose sizes differ by more than this factor stand on axes of their own.
LINES, APART = 5, 30.0
#: The subjects in order.
ACHIEVES, KNOWS, LOOKS, INSIDE, CONTROLS, OTHER = SUBJECTS = (
    "What it achieves", "What it knows, and when", "What it looks at", "Inside the network",
    "What controls were set to", "Other numbers",
)  # fmt: skip
#: Shares of rows are told in words; how much was looked at says nothing of the agent.
_NOT_DRAWN = re.compile(r"(?:computed|nonfinite|final)\..*|states|episodes\.ended", re.DOTALL)


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: labels and the names of their series."""

    subject: str
    title: str
    names: Mapping[str, str]


def panels_of(series: Mapping[str, Series]) -> list[Panel]:
    """All curves of a run in groups of a few, the most telling first.

    Example:
        >>> series = {name: [(0, 0.5)] for name in ("loss", "reward", "computed.attr")}
        >>> [panel.title for panel in panels_of(series)]
        ['reward', 'loss']
    """
    return _Sorting(series).panels()


class _Sorting:
    """Takes curves out of those that wait, subject by subject."""

    def __init__(self, series: Mapping[str, Series]) -> None:
        self.series = series
        self.waiting = {
            name: curve
            for name, curve in series.items()
            if not _NOT_DRAWN.fullmatch(name) and any(math.isfinite(value) for _, value in curve)
        }
        self.found: list[Panel] = []

    def panels(self) -> list[Panel]:
        for name in [name for name in behaviour_of(self.series) if name in self.waiting][:4]:
            self._take(ACHIEVES, name, {name: name})
        self._probes()
        self._attributions()
        self._inside()
        controls = [name for name in self.waiting if name.startswith("control.")]
        self._take(CONTROLS, "Controls", {name.removeprefix("control."): name for name in controls})
        rest: dict[str, dict[str, str]] = {}
        for name in self.waiting:
            head, label = re.fullmatch(r"(?:(.*)[./])?(.*)", name, flags=re.DOTALL).groups()  # type: ignore[union-attr]
            rest.setdefault(head or "", {})[label or name] = name
        for head, names in rest.items():
            self._take(OTHER, head, names)
        return self.found

    def _probes(self) -> None:
        for probe in probes_of(self.series).values():
            name = next(name for name, curve in self.series.items() if curve is probe.main)
            self._take(KNOWS, f"Probe of {probe.name}: held-out {probe.score}", {probe.name: name})
        for name in [name for name in self.waiting if name.startswith("probe.")]:
            del self.waiting[name]  # limits, counts and controls

    def _attributions(self) -> None:
        for head, masses in masses_of(self.waiting, self.series).items():
            ranked = sorted(masses, key=lambda name, masses=masses: -or_zero(last(masses[name])))
            names = {one: f"mass.{head}.{one}" for one in ranked[:LINES]}
            self._take(LOOKS, f"Share of the attribution of {head}", names, split=False)
            for one in ranked[LINES:]:
                del self.waiting[f"mass.{head}.{one}"]
        for head, inner in features_of(self.waiting).items():
            self._take(LOOKS, f"Mean |attribution| of {head.removeprefix('attr.')}", {head: head})
            for feature in inner:
                del self.waiting[f"{head}.{feature}"]
        for name in [name for name in self.waiting if name.startswith("attr.")]:
            self._take(LOOKS, f"Mean |attribution| of {name.removeprefix('attr.')}", {name: name})

    def _inside(self) -> None:
        for kind, unit in HEALTH.items():
            names = {name[len(kind) + 1 :] or kind: name for name in self.waiting if measure(name) == kind}
            self._take(INSIDE, f"{kind.replace('_', ' ').capitalize()} ({unit})", names)
        for site in [name for name in self.waiting if f"{name}.std" in self.waiting]:
            statistics = {one: f"{site}.{one}" for one in ("mean", "std", "max")}
            self._take(INSIDE, f"Activations of {site.removeprefix('cache.')}", {"mean |.|": site, **statistics})
            self._take(INSIDE, f"Share of zeros at {site.removeprefix('cache.')}", {"zero": f"{site}.zero"})

    def _take(self, subject: str, title: str, names: Mapping[str, str], split: bool = True) -> None:
        there = {label: name for label, name in names.items() if name in self.waiting}
        groups = self._split(there) if split else [there]
        for group in groups if there else ():
            listed = ", ".join(group)
            whole = title if len(groups) == 1 and title else f"{title}: {listed}" if title else listed
            self.found.append(Panel(subject, whole, group))
        for name in there.values():
            del self.waiting[name]

    def _split(self, names: Mapping[str, str]) -> list[dict[str, str]]:
        """Groups of a few curves of about one size."""
        sizes = {
            label: max((abs(value) for _, value in self.series[name] if math.isfinite(value)), default=0.0)
            for label, name in names.items()
        }
        found: list[dict[str, str]] = []
        largest = 0.0
        for label in sorted(names, key=lambda one: -sizes[one]):
            if not found or len(found[-1]) >= LINES or sizes[label] * APART < largest:
                found.append({})
                largest = sizes[label]
            found[-1][label] = names[label]
        return found


def or_zero(value: float) -> float:
    """The value, or 0 where it is not finite."""
    return value if math.isfinite(value) else 0.0
