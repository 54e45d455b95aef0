"""What was read of a run, whoever has written it: one plain record."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tdhook_rl.files.durable import parse_json
from tdhook_rl.report.page import Finding
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.sweeps import SweepResult

#: Steps and values, in the order in which they were logged.
Series = list[tuple[int, float]]
#: Larger documents are none of a run.
LARGEST = 64 << 20


@dataclass(frozen=True)
class Shown:
    """A picture or animation that was logged.

    Attributes:
        step: where on the axis of the run.
        source: its file, or what the file holds.
        ending: which kind of file, ``"png"``.
        caption: as it was logged, if that is kept.
    """

    step: int
    source: Path | bytes = field(repr=False)
    ending: str
    caption: str = ""

    def content(self) -> bytes:
        """What the file holds.

        Raises:
            OSError: if it cannot be read.
        """
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def size(self) -> int:
        """Bytes; 0 where the file has gone."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.stat().st_size if self.source.is_file() else 0


@dataclass(frozen=True)
class Bins:
    """A histogram that was logged: counts, and the edges between them."""

    step: int
    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Rows:
    """A table that was logged."""

    step: int
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Kept:
    """Files that were kept: a probe, a vector."""

    name: str
    step: int | None
    kind: str
    files: Sequence[Path]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A figure that was saved, with what is beside it."""

    title: str
    path: Path
    alt: str
    caption: str
    data: Mapping[str, Any]


@dataclass(kw_only=True)
class Run:
    """A run as it was read.

    Attributes:
        name: of its folder, or as its logger calls it.
        path: what was read.
        kind: which kind of folder, in words.
        axis: what steps count.
        config: settings and facts.
        series: numbers by name.
        histograms, pictures, animations, tables: by name, each in order of steps.
        artifacts: files that were kept.
        figures: figures that were saved.
        players: names of the episode players that were recorded.
        sweep: what steering was found to do, if that was tried.
        texts: by name.
        findings: answers that were written down.
        ended: whether it came to its end; ``None`` where nothing says so.
        warnings: what could not be read, and what the run itself said.
    """

    name: str
    path: Path
    kind: str
    axis: str = "frames"
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    histograms: dict[str, list[Bins]] = field(default_factory=dict)
    pictures: dict[str, list[Shown]] = field(default_factory=dict)
    animations: dict[str, list[Shown]] = field(default_factory=dict)
    tables: dict[str, list[Rows]] = field(default_factory=dict)
    artifacts: list[Kept] = field(default_factory=list)
    figures: list[Drawn] = field(default_factory=list)
    players: list[str] = field(default_factory=list)
    sweep: SweepResult | None = None
    texts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    ended: bool | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The largest step that anything was logged at."""
        steps = [step for series in self.series.values() for step, _ in series]
        for group in (self.histograms, self.pictures, self.animations, self.tables):
            steps += [one.step for listed in group.values() for one in listed]
        return max(steps, default=None)

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        found = (self.series, self.histograms, self.pictures, self.animations, self.tables)
        others = (self.artifacts, self.figures, self.players, self.texts, self.findings)
        return not any(found) and not any(others) and self.sweep is None

    def add(self, other: Run, prefix: str) -> None:
        """Take in what a monitor has written beside; it knows better what is under its prefix.

        What has a name already, of the run or of another monitor, keeps the prefix, in words.
        """
        taken: list[str] = []
        for group in ("series", "histograms", "pictures", "animations", "tables", "texts"):
            mine = getattr(self, group)
            for name in [name for name in mine if name.startswith(f"{prefix}/")]:
                del mine[name]
            clash = [name for name in getattr(other, group) if name in mine]
            mine.update(
                {f"{prefix}/{name}" if name in clash else name: one for name, one in getattr(other, group).items()}
            )
            taken += clash
        if taken:
            more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
            self.warnings.append(
                f"{', '.join(taken[:3])}{more} of {prefix}/ are shown as {prefix}/...: others have these names"
            )
        self.artifacts = [one for one in self.artifacts if not one.name.startswith(f"{prefix}/")] + other.artifacts
        self.figures += other.figures
        self.config = {**self.config, **other.config}
        self.config.pop(prefix, None)
        self.findings += other.findings
        self.warnings += other.warnings
        self.ended = other.ended if self.ended is None or other.ended is False else self.ended

    def in_order(self) -> Run:
        """Everything by step, and what a monitor has logged under the names that it has in the monitor's folder."""
        self._without(f"{PREFIX}/")
        for group in (self.histograms, self.pictures, self.animations, self.tables):
            for listed in group.values():
                listed.sort(key=lambda one: one.step)
        for name, series in self.series.items():
            if any(later[0] < earlier[0] for earlier, later in pairwise(series)):
                self.series[name] = sorted(series, key=lambda pair: pair[0])
        return self

    def _without(self, prefix: str) -> None:
        if self.series and all(name.startswith(prefix) for name in self.series):
            self.axis = "frames"
        for group in ("series", "histograms", "pictures", "animations", "tables"):
            mine = getattr(self, group)
            short = {name: name.removeprefix(prefix) for name in mine}
            if len(set(short.values())) == len(mine):
                setattr(self, group, {short[name]: one for name, one in mine.items()})
        known = self.config.get(prefix[:-1])
        if isinstance(known, Mapping):
            self.config = {**{name: one for name, one in self.config.items() if name != prefix[:-1]}, **known}


@contextmanager
def noted(run: Run) -> Iterator[None]:
    """What is warned of while something is read is noted in the run."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    run.warnings += [str(one.message) for one in told if issubclass(one.category, UserWarning)]


def document(run: Run, path: Path) -> Any:
    """A JSON document; ``None``, with a note, where it cannot be read."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.warnings.append(f"{path.name} cannot be read and is left out: {_reason(error)}")
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it was cut, or is no JSON"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
