"""Offline runs of W&B: history, config and media, from the records that would be uploaded."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tdhook_rl.files.durable import parse_json
from tdhook_rl.report.runs.record import Bins, Kept, Rows, Run, Shown
from tdhook_rl.report.runs.wandb_records import items_of, records

KIND = "an offline run of W&B"
_NOT_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def is_one(path: Path) -> bool:
    """Whether a folder is one."""
    return any(one.is_file() for one in path.glob("*.wandb"))


def read(path: Path) -> Run:
    """All that is in it."""
    run = Run(name=path.resolve().name, path=path, kind=KIND, axis="steps", ended=False)
    reader = _Reader(run, path / "files")
    for file in sorted(path.glob("*.wandb")):
        damaged: list[str] = []
        try:
            for record in records(file, damaged):
                reader.take(record)
        except OSError as error:
            run.warnings.append(f"{file.name} cannot be read: {error.strerror}")
        if damaged:
            run.warnings.append(f"of {file.name} is left out, as it was cut or damaged: {', '.join(damaged[:3])}")
    if reader.missing:
        run.warnings.append(
            f"{len(reader.missing)} files that the run names are not beside it, {reader.missing[0]} among them"
        )
    return run


class _Reader:
    """Takes the records one by one."""

    def __init__(self, run: Run, files: Path) -> None:
        self.run, self.files = run, files
        self.missing: list[str] = []
        self._axes: list[tuple[str, str]] = []

    def take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self._history(items_of(record.history.item))
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            if record.metric.step_metric:
                self._axes.append((name, record.metric.step_metric))
        elif kind == "config":
            found = items_of(record.config.update)
            self.run.config |= {name: value for name, value in found.items() if name != "_wandb"}
        elif kind == "run":
            self.run.name = record.run.display_name or record.run.run_id or self.run.name
            found = items_of(record.run.config.update)
            self.run.config |= {name: value for name, value in found.items() if name != "_wandb"}
        elif kind == "exit":
            self.run.ended = True
        elif kind == "artifact":
            names = [str(entry.path) for entry in record.artifact.manifest.contents]
            facts = {"files": ", ".join(names[:10])} if names else {}
            self.run.artifacts.append(Kept(record.artifact.name, None, record.artifact.type, [], facts))

    def _history(self, row: dict[str, Any]) -> None:
        row = dict(_flat(row))
        for name, value in row.items():
            if name[0] == "_" or name in {axis for _, axis in self._axes}:
                continue
            step = self._step(name, row)
            value = _NOT_NUMBERS.get(value, value) if isinstance(value, str) else value
            if isinstance(value, bool | int | float):
                self.run.series.setdefault(name, []).append((step, float(value)))
            elif isinstance(value, Mapping) and "_type" in value:
                self._media(name, step, value)

    def _step(self, name: str, row: Mapping[str, Any]) -> int:
        for pattern, axis in self._axes:
            if (name == pattern or fnmatch.fnmatchcase(name, pattern)) and isinstance(row.get(axis), int | float):
                return int(row[axis])
        step = row.get("_step", 0)
        return int(step) if isinstance(step, int | float) else 0

    def _media(self, name: str, step: int, value: Mapping[str, Any]) -> None:
        run, kind = self.run, value["_type"]
        try:
            if kind == "histogram":
                counts = np.asarray(value["values"], float)
                if "bins" in value:
                    edges = np.asarray(value["bins"], float)
                else:
                    packed = value["packedBins"]
                    edges = packed["min"] + packed["size"] * np.arange(packed["count"] + 1)
                if len(edges) == len(counts) + 1 and np.isfinite(edges).all():
                    run.histograms.setdefault(name, []).append(Bins(step, counts, edges))
            elif kind == "table-file" and (path := self._file(value["path"])) is not None:
                table = parse_json(path.read_text(encoding="utf-8"))
                run.tables.setdefault(name, []).append(Rows(step, list(map(str, table["columns"])), table["data"]))
            elif kind == "images/separated":
                captions = value.get("captions") or []
                for number, one in enumerate(value["filenames"]):
                    caption = str(captions[number]) if number < len(captions) else ""
                    self._show(run.pictures, name, step, one, caption)
            elif kind == "image-file":
                self._show(run.pictures, name, step, value["path"], str(value.get("caption") or ""))
            elif kind == "video-file":
                self._show(run.animations, name, step, value["path"], str(value.get("caption") or ""))
        except (KeyError, TypeError, ValueError, OSError, RecursionError):
            run.warnings.append(f"{name} at step {step:,} is no {kind} that can be read, and is left out")

    def _show(self, group: dict[str, list[Shown]], name: str, step: int, path: str, caption: str) -> None:
        if (file := self._file(path)) is not None:
            group.setdefault(name, []).append(Shown(step, file, file.suffix[1:], caption))

    def _file(self, name: str) -> Path | None:
        path = self.files / name
        # A record names files of its own folder, whatever it says.
        if path.is_file() and path.resolve().is_relative_to(self.files.resolve()):
            return path
        self.missing.append(name)
        return None


def _flat(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What was logged by name; of mappings the entries, named as W&B shows them, ``train.loss``."""
    for name, value in row.items():
        if isinstance(value, Mapping) and "_type" not in value:
            yield from _flat(value, f"{before}{name}.")
        elif name:
            yield f"{before}{name}", value
