"""Folders of TorchRL's ``CSVLogger``: a file of scalars for each name, videos, texts."""

from __future__ import annotations

import re
from pathlib import Path

from tdhook_rl.report.runs.record import Run, Series, Shown

KIND = "a folder of TorchRL's CSVLogger"
_STEP = re.compile(r"-?[0-9]{1,30}")


def is_one(path: Path) -> bool:
    """Whether a folder is one."""
    return (path / "scalars").is_dir()


def read(path: Path) -> Run:
    """All that is in it."""
    run = Run(name=path.resolve().name, path=path, kind=KIND, axis="steps")
    scalars = path / "scalars"
    cut: list[str] = []
    for file in sorted(scalars.rglob("*.csv")):
        name = file.relative_to(scalars).as_posix().removesuffix(".csv")
        series, bad = _series(file)
        if bad:
            cut.append(f"{name} ({bad})")
        if series:
            run.series[name] = series
    if cut:
        more = f" and {len(cut) - 5} more files" if len(cut) > 5 else ""
        run.warnings.append(f"lines were cut, or are no numbers, and are left out: of {', '.join(cut[:5])}{more}")
    for file in sorted((path / "videos").rglob("*")):
        if file.is_file():
            name, _, number = file.relative_to(path / "videos").with_suffix("").as_posix().rpartition("_")
            step = int(number) if _STEP.fullmatch(number) else 0
            run.animations.setdefault(name or "video", []).append(Shown(step, file, file.suffix[1:]))
    for file in sorted((path / "texts").rglob("*.txt")):
        name = file.relative_to(path / "texts").with_suffix("").as_posix()
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if re.fullmatch(r"hparams\d*", name):
            run.config |= dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        else:
            run.texts[name] = text
    return run


def _series(file: Path) -> tuple[Series, int]:
    """The pairs in a file, and how many lines are none."""
    found: Series = []
    bad = 0
    try:
        content = file.read_bytes()
    except OSError:
        return found, 1
    for line in content.splitlines(keepends=True):
        step, _, value = line.decode(errors="replace").partition(",")
        try:
            # A number that was cut is another number.
            if not line.endswith(b"\n") or not _STEP.fullmatch(step):
                raise ValueError
            found.append((int(step), float(value)))
        except ValueError:
            bad += 1
    return found, bad
