"""Which kind of run a folder is, and reading it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from tdhook_rl.errors import ArtifactError
from tdhook_rl.report.runs import analysis, csv_logger, folder, tensorboard_run, wandb_run
from tdhook_rl.report.runs.record import Run

#: In the order in which they are tried: a folder of ours may lie in one of the others.
KINDS: tuple[ModuleType, ...] = (analysis, folder, wandb_run, csv_logger, tensorboard_run)
#: How deep runs are looked for below a folder that is none, and among how many folders.
DEEP, MANY = 3, 2000


def read_run(path: str | Path) -> Run:
    """A run, whoever has written it and however it ended.

    Args:
        path: a folder of ours (of a monitor, the demo, an experiment, an analysis), of TorchRL's ``CSVLogger``, of an
            offline W&B run, or with TensorBoard's event files; a file in one; or a folder with one of them in it.

    Raises:
        ArtifactError: if there is no run, or several.

    Example:
        >>> import tempfile
        >>> from tdhook_rl.report import FolderSink
        >>> sink = FolderSink(tempfile.mkdtemp())
        >>> sink.log({"loss": 0.5}, 10)
        >>> sink.close()
        >>> read_run(sink.path).series
        {'loss': [(10, 0.5)]}
    """
    asked = Path(path)
    if not os.path.lexists(asked):
        raise ArtifactError(f"there is no {asked}: a report is made of the folder of a run")
    place = asked if asked.is_dir() else asked.parent
    kind = _kind(place)
    if kind is None and asked.is_dir():
        place, kind = _below(asked)
    if kind is None:
        shown = f"{asked}" if asked.is_dir() else f"{asked} is a file, and its folder {place.absolute()}"
        raise ArtifactError(f"{shown} {_holds(place)} {_known()}")
    try:
        run = kind.read(place)
        beside = [one for one in sorted(place.iterdir()) if one.is_dir() and folder.is_one(one)]
        for one in beside if kind is not folder and kind is not analysis else ():
            run.add(folder.read(one), one.name)
    except OSError as error:
        raise ArtifactError(f"{asked} cannot be read: {error.strerror or error}") from error
    if run.empty and not run.warnings:
        raise ArtifactError(f"{place} is {run.kind}, and nothing is in it yet")
    return run.in_order()


def _kind(place: Path) -> ModuleType | None:
    return next((kind for kind in KINDS if kind.is_one(place)), None)


def _below(asked: Path) -> tuple[Path, ModuleType | None]:
    """The one run in a folder that is none itself."""
    found = _runs_below(asked)
    if len(found) > 1:
        names = ", ".join(str(one) for one in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise ArtifactError(f"{asked} is no run; it holds {len(found)} of them: name one or several, of {names}")
    return (found[0], _kind(found[0])) if found else (asked, None)


def _runs_below(asked: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [(asked, 0)]
    while waiting and len(seen) < MANY:
        place, depth = waiting.pop(0)
        try:
            inner = sorted(one for one in place.iterdir() if one.is_dir() and one.name[0] != ".")
        except OSError:
            continue
        for one in inner:
            real = one.resolve()  # W&B links to its latest run
            if real in seen:
                continue
            seen.add(real)
            if _kind(one) is not None:
                found.append(real.relative_to(Path.cwd()) if real.is_relative_to(Path.cwd()) else real)
            elif depth + 1 < DEEP:
                waiting.append((one, depth + 1))
    return found


def _holds(place: Path) -> str:
    names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in place.iterdir())
    if not names:
        return "is empty, and no run:"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"is no run that is known: it holds {shown};"


def _known() -> str:
    return (
        f"a report is made of {folder.KIND} (with {folder.LOG}), {analysis.KIND} (with {analysis.MANIFEST}), "
        f"{wandb_run.KIND} (with a .wandb file), {csv_logger.KIND} (with scalars/), or {tensorboard_run.KIND}"
    )
