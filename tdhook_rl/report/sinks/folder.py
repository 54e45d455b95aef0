"""A run's own folder: every number and picture is written here first, whatever becomes of it elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tdhook_rl.errors import ArtifactError, warn
from tdhook_rl.files.durable import FolderLock, write_text
from tdhook_rl.report.media import Artifact, Histogram, Media
from tdhook_rl.report.sinks.file import FileSink
from tdhook_rl.report.sinks.names import Tags
from tdhook_rl.report.sinks.values import sorted_values

__all__ = ["FolderSink", "new_folder"]


class FolderSink:
    """Numbers as lines of ``log.csv``, histograms as lines of ``histograms.jsonl``, and a file for everything else.

    Each file is whole whenever there is one, also after a kill. Where the disk is full, or the folder as large as
    allowed, what has no room is left out with one warning. A folder is one run's at a time, until it is closed; where
    it is moved away meanwhile, the rest is in a new one.

    Args:
        path: a folder, which is made.
        resume: go on where there is a log already.
        most_bytes: of media and artifacts; numbers are always written.

    Raises:
        ArtifactError: if there is a log already, another run writes into the folder, or it cannot be written.

    Example:
        >>> import tempfile
        >>> from tdhook_rl.report import Image
        >>> folder = FolderSink(tempfile.mkdtemp())
        >>> folder.log({"loss": 0.5, "map": Image([[0.0, 1.0]])}, 10)
        >>> folder.close()
        >>> sorted(str(one.relative_to(folder.path)) for one in folder.path.rglob("*.*"))
        ['log.csv', 'media/map/000000010.png']
    """

    def __init__(self, path: str | Path, *, resume: bool = False, most_bytes: float = float("inf")) -> None:
        self.path = Path(path)
        self._lock()
        try:
            self._file = FileSink(self.path / "log.csv", resume=resume)
        except BaseException:
            self._free()
            raise
        self._tags = Tags("media", other=r'[<>:"|?*\x00-\x1f]')
        self._most = most_bytes
        self._told = False
        self._written = 0
        self._config: Mapping[str, Any] | None = None
        if resume:
            found = [one for name in ("media", "artifacts") for one in (self.path / name).rglob("*")]
            self._written = sum(one.stat().st_size for one in found if one.is_file())

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write values; media have a ``path`` afterwards, unless there was no room."""
        number, values, media = sorted_values(metrics, step)
        if not self.path.is_dir():
            self._renew()
        if values:
            self._file.log(values, number)
        for name, one in media.items():
            try:
                one.path = self._histogram(name, one, number) if isinstance(one, Histogram) else None
                if one.path is None:
                    one.path = self._keep(name, one, number)
            except OSError as error:
                self._say(f"cannot be written ({error.strerror})", name)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write what the run is, ``config.json``."""
        self._config = config
        self._document("config.json", config)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Write the last values, ``summary.json``."""
        self._document("summary.json", {name: value if value == value else None for name, value in values.items()})

    def note(self, text: str) -> None:
        """Keep what a reader of the run has to know, a line of ``notes.txt``, where there is room for it."""
        with contextlib.suppress(OSError), (self.path / "notes.txt").open("a", encoding="utf-8") as file:
            file.write(" ".join(text.split()) + "\n")

    def close(self) -> None:
        """Finish; what was logged stays readable."""
        self._file.close()
        self._free()

    def _lock(self) -> None:
        """Take the folder, which is made; it is free when the sink is closed, or nobody has it any more."""
        lock = FolderLock(self.path, "log", "close it")
        lock.__enter__()
        self._free = weakref.finalize(self, lock.__exit__)

    def _renew(self) -> None:
        """Make the folder anew, which was removed or moved away; what cannot be made is told by what is written."""
        self._free()
        with contextlib.suppress(ArtifactError):
            self._lock()
            if self._config is not None:
                self.describe(self._config)

    def _document(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            write_text(self.path / name, json.dumps(content, indent=1, default=str) + "\n")
        except OSError as error:
            self._say(f"cannot be written ({error.strerror})", name)

    def _histogram(self, name: str, value: Histogram, step: int) -> Path:
        path = self.path / "histograms.jsonl"
        line = {"step": step, "name": name, "counts": value.counts.tolist(), "edges": value.edges.tolist()}
        content = (json.dumps(line) + "\n").encode()
        with path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(content) != len(content):
                    raise OSError(28, "No space left on device")
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise
        return path

    def _keep(self, name: str, value: Media, step: int) -> Path | None:
        if isinstance(value, Artifact):
            sources = [Path(file) for file in value.files]
            folder = self.path / "artifacts" / self._tags[name].split("/", 1)[1] / f"{step:09d}"
            if not self._room(sum(file.stat().st_size for file in sources), name):
                return None
            folder.mkdir(parents=True, exist_ok=True)
            for file in sources:
                _place(folder / file.name, partial(shutil.copyfile, file))
            facts = {"kind": value.kind, "aliases": list(value.aliases), "facts": dict(value.facts)}
            write_text(folder / "artifact.json", json.dumps(facts, indent=1, default=str) + "\n")
            return folder
        content = value.content()
        if not self._room(len(content), name):
            return None
        path = self.path / self._tags[name] / f"{step:09d}{value.ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _place(path, lambda new: new.write_bytes(content))
        return path

    def _room(self, size: int, name: str) -> bool:
        if self._written + size > self._most:
            self._say(f"holds the {self._most:.3g} bytes of media that are allowed (budget)", name)
            return False
        self._written += size
        return True

    def _say(self, why: str, name: str) -> None:
        if not self._told:
            self._told = True
            self.note(f"the folder {why}: {name!r}, and what follows without room, is left out")
            warn(f"{self.path} {why}: {name!r}, and what follows without room, is left out; numbers go on")


def _place(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and put there when it is whole.

    Raises:
        OSError: if it cannot be written; nothing is left then.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        write(new)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def new_folder(path: str | Path) -> Path:
    """Create a folder for the output of one run.

    Raises:
        ArtifactError: if it holds something already, is a file, or cannot be written.
    """
    path = Path(path)
    if path.is_file():
        raise ArtifactError(f"{path} is a file: name a folder for the output")
    if path.is_dir() and any(path.iterdir()):
        raise ArtifactError(f"{path} holds the output of another run: name a new folder, or remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArtifactError(f"cannot write into {path}: {error.strerror}; name a folder you may write to") from error
    return path
