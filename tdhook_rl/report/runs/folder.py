"""Folders of ours: of a monitor, the demo, experiments, sweeps. What a kill has cut is left out, and said."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.durable import parse_json
from tdhook_rl.report.page.findings_file import FINDINGS, load_findings
from tdhook_rl.report.runs.record import Bins, Drawn, Kept, Rows, Run, Shown, document, noted
from tdhook_rl.report.sinks.file import FileSink
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.sweeps import SweepResult

KIND = "a folder of tdhook_rl"
#: What tells such a folder.
LOG, HISTOGRAMS, NOTES, SWEEP = "log.csv", "histograms.jsonl", "notes.txt", "sweep.safetensors"
_STEP = re.compile(r"-?[0-9]{1,30}")
PICTURES, ANIMATIONS = (".png", ".jpg", ".jpeg", ".webp"), (".gif", ".mp4", ".webm")


def is_one(path: Path) -> bool:
    """Whether a folder is one."""
    marks = (LOG, HISTOGRAMS, FINDINGS, SWEEP)
    return any((path / name).is_file() for name in marks) or any((path / "figures").glob("*.json"))


def read(path: Path) -> Run:
    """All that is in it."""
    place = path.resolve()
    # Beside what another logger writes, a monitor's folder is called after the prefix: the run is the folder around.
    run = Run(name=place.parent.name if place.name == PREFIX else place.name, path=path, kind=KIND)
    run.config = _mapping(document(run, path / "config.json"))
    with noted(run):
        _read_log(run, path / LOG)
    _read_histograms(run, path / HISTOGRAMS)
    _read_media(run, path / "media")
    _read_artifacts(run, path)
    _read_figures(run, path / "figures")
    if (path / FINDINGS).is_file():
        try:
            run.findings = load_findings(path / FINDINGS)
        except ArtifactError as error:
            run.warnings.append(str(error))
    if (path / SWEEP).is_file():
        try:
            run.sweep = SweepResult.load(path)
        except ArtifactError as error:
            run.warnings.append(str(error))
    run.players = sorted(one.stem for one in (path / "players").glob("*.json"))
    if (path / NOTES).is_file():
        run.warnings += (path / NOTES).read_text(encoding="utf-8", errors="replace").splitlines()
    if (path / "summary.json").is_file() or (path / FINDINGS).is_file():
        run.ended = True
    elif (path / "config.json").is_file():
        run.ended = False
    return run


def _read_log(run: Run, path: Path) -> None:
    if not path.exists():
        return
    try:
        run.series = FileSink.read(path)
    except ArtifactError as error:
        run.warnings.append(str(error))
    pairs = (pair for series in run.series.values() for pair in pairwise(series))
    back = next(((before, after) for (before, _), (after, _) in pairs if after < before), None)
    if back is not None:
        run.warnings.append(
            f"the log goes back from step {back[0]:,} to {back[1]:,}: the run went on from an earlier state, or two "
            "wrote into it; what was measured twice is shown twice"
        )


def _read_histograms(run: Run, path: Path) -> None:
    if not path.is_file():
        return
    bad = 0
    with path.open("rb") as file:
        for line in file:
            try:
                found = parse_json(line.decode())
                counts, edges = np.asarray(found["counts"], float), np.asarray(found["edges"], float)
                whole = counts.ndim == edges.ndim == 1 and len(edges) == len(counts) + 1 > 1
                if not whole or not np.isfinite(edges).all() or not np.isfinite(counts).all():
                    raise ValueError
                run.histograms.setdefault(str(found["name"]), []).append(Bins(int(found["step"]), counts, edges))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                bad += 1
    if bad:
        run.warnings.append(f"{bad} of the lines of {path.name} were cut, or are no histograms, and are left out")


def _read_media(run: Run, folder: Path) -> None:
    for path in _files(folder):
        step = _step(path.stem)
        if step is None or path.suffix == ".new":
            continue
        name = path.parent.relative_to(folder).as_posix()
        if path.suffix in PICTURES:
            run.pictures.setdefault(name, []).append(Shown(step, path, path.suffix[1:]))
        elif path.suffix in ANIMATIONS:
            run.animations.setdefault(name, []).append(Shown(step, path, path.suffix[1:]))
        elif path.suffix == ".csv":
            table = read_table(run, path, step)
            if table is not None:
                run.tables.setdefault(name, []).append(table)


def read_table(run: Run, path: Path, step: int) -> Rows | None:
    """A CSV file with a header; its numbers are numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = [*csv.reader(file)]
    except (OSError, ValueError, csv.Error):
        run.warnings.append(f"the table {path.parent.name}/{path.name} cannot be read and is left out")
        return None
    whole = [[_cell(cell) for cell in row] for row in rows if len(row) == len(columns)]
    if len(whole) < len(rows):
        run.warnings.append(f"{len(rows) - len(whole)} rows of the table {path.parent.name}/{path.name} were cut")
    return Rows(step, columns, whole)


def _cell(text: str) -> Any:
    if not text:
        return None
    if "_" in text:  # which Python takes for a number, 1_2 for 12
        return text
    try:
        return int(text) if _STEP.fullmatch(text) else float(text)
    except ValueError:
        return text


def _read_artifacts(run: Run, path: Path) -> None:
    """Those of ``artifacts/NAME/STEP``, and files with facts that a command has put beside its log."""
    for facts in sorted((path / "artifacts").rglob("artifact.json")):
        known = _mapping(document(run, facts))
        folder = facts.parent
        files = [one for one in sorted(folder.iterdir()) if one.is_file() and one.name != facts.name]
        name = folder.parent.relative_to(path / "artifacts").as_posix()
        step = _step(folder.name)
        kind = str(known.get("kind", "artifact"))
        run.artifacts.append(Kept(name, step, kind, files, _mapping(known.get("facts"))))
    for file in sorted(path.glob("*.safetensors")):
        known = _mapping(document(run, file.with_suffix(".json")))
        files = [one for one in (file, file.with_suffix(".json")) if one.is_file()]
        run.artifacts.append(Kept(file.stem, None, str(known.get("kind", "tensors")), files, known))


def _read_figures(run: Run, folder: Path) -> None:
    for beside in sorted(folder.glob("*.json")):
        picture = next((one for ending in (".svg", ".png") if (one := beside.with_suffix(ending)).is_file()), None)
        known = _mapping(document(run, beside))
        if picture is not None and known:
            texts = {name: str(known.get(name, "")) for name in ("title", "alt", "caption")}
            run.figures.append(Drawn(path=picture, data=_mapping(known.get("data")), **texts))


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (one for one in sorted(folder.rglob("*")) if one.is_file())


def _step(text: str) -> int | None:
    return int(text) if _STEP.fullmatch(text) else None


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
