"""The log of a run as lines of a file: readable whatever ends the run, also while it goes on."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.report.sinks.values import scalars

__all__ = ["FileSink"]

COLUMNS = ("step", "name", "value")
_STEP = re.compile(r"-?[0-9]{1,30}")
_VALUE = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|inf|nan)")


class FileSink:
    """Scalars as ``step,name,value`` lines; each call is written at once, so that a stopped run leaves all it measured.

    Where the disk is full, what cannot be written is left out, whole; a warning says so once, and the log goes on as
    soon as there is room. Where the file was removed, moved away or replaced meanwhile, which is said once, it goes on
    in what is at its path, or in a new file.

    Args:
        path: a new file.
        resume: go on in a file that exists, after its last whole line.

    Raises:
        ArtifactError: if it exists already, is no log, or cannot be written.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self._told: set[str] = set()
        try:
            self._file = _opened(self.path, resume)
        except FileExistsError:
            raise ArtifactError(
                f"{self.path} exists already, and another run is not overwritten: name another place, or go on in "
                "this one with resume=True"
            ) from None
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write scalars; as of :func:`scalars`.

        Raises:
            InputError: as of :func:`scalars`; once it is closed.
        """
        if self._file.closed:
            raise InputError(f"{self.path} is closed: open another log, with resume=True to go on in it")
        text = io.StringIO()
        number, values = scalars(metrics, step)
        csv.writer(text, lineterminator="\n").writerows([number, name, repr(value)] for name, value in values.items())
        try:
            if not self._in_place():
                self._follow(number)
            _write(self._file, text.getvalue())
        except (OSError, ArtifactError) as error:
            self._tell(
                "written",
                f"{self.path} cannot be written ({getattr(error, 'strerror', None) or error}): what is measured from "
                f"step {number} on is not in it, until there is room",
            )

    def _in_place(self) -> bool:
        """Whether what is written is what a reader finds: a file that was removed takes what it is given as before."""
        here = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) and there.st_size > 0

    def _follow(self, step: int) -> None:
        """Go on in what is at the path now, or in a new file.

        Raises:
            OSError: if it cannot be written.
            ArtifactError: if it is no log.
        """
        found = "replaced" if self.path.exists() else "removed or moved"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(self.path, going_on=True)
        self._file.close()
        self._file = file
        self._tell(
            "followed",
            f"{self.path} was {found} while it was written: from step {step} on the log goes on in "
            f"{'the file that is there now' if found == 'replaced' else 'a new one'}, without what was in it before",
        )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn(message)

    def close(self) -> None:
        """Finish; what was logged stays readable. Where a disk says only now that something is lost, it warns."""
        try:
            self._file.close()
        except OSError as error:
            warn(f"{self.path} could not be closed ({error.strerror}): the last of what was logged may not be in it")

    @classmethod
    @checked
    def read(cls, path: str | Path) -> dict[str, list[tuple[int, float]]]:
        """The curves of a log file: ``(step, value)`` pairs by name.

        Lines that were cut (a full disk, a run that was killed while it wrote) are left out with one warning: a number
        that was cut is another number.

        Raises:
            ArtifactError: if there is no such file, or it is no log.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no log {path}")
        curves: dict[str, list[tuple[int, float]]] = {}
        odd: list[int] = []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    row = _fields(line)
                    if number == 1:
                        _require_log(path, line, row)
                        odd += [] if row is not None else [number]
                    elif row is None or (entry := _entry(row)) is None:
                        odd.append(number)
                    else:
                        curves.setdefault(row[1], []).append(entry)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
        if odd:
            shown = ", ".join(map(str, odd[:5])) + (", ..." if len(odd) > 5 else "")
            lines = f"line {shown} was" if len(odd) == 1 else f"{len(odd)} lines ({shown}) were"
            warn(f"of {path} {lines} cut and left out; the rest is read")
        return curves


def _opened(path: Path, going_on: bool) -> io.FileIO:
    """A log to write to, after its last whole line.

    Raises:
        OSError: if it cannot be written; FileExistsError where there is one that is not to be gone on with.
        ArtifactError: if it is to be gone on with, and no log.
    """
    going_on = going_on and path.exists()
    if going_on:
        _end_at_a_line(path)
    # At the end of what is there, whoever wrote it: a run that goes on in this file loses no line to this one.
    file = open(path, "ab" if going_on else "xb", buffering=0, opener=_appending)
    if os.fstat(file.fileno()).st_size:
        return file
    try:
        _write(file, f"{','.join(COLUMNS)}\n")
    except OSError:
        file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def _write(file: io.FileIO, text: str) -> None:
    """Write all of a text or, as far as that is possible, nothing of it."""
    start = os.fstat(file.fileno()).st_size
    content = memoryview(text.encode())
    try:
        while len(content):
            content = content[file.write(content) or 0 :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
            file.seek(start)
        raise


def _appending(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND, 0o666)


def _end_at_a_line(path: Path) -> None:
    """Cut off what a kill left half written, where a file is a log."""
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} is no file: it is not written to")
        with path.open("r+b") as file:
            first = file.readline()
            _require_log(path, first, _fields(first))
            end = size = file.seek(0, os.SEEK_END)
            while end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
                end -= 1
            if end != size:
                file.truncate(end)
    except OSError as error:
        raise ArtifactError(f"cannot go on in {path}: {error.strerror}") from error


def _fields(line: bytes) -> list[str] | None:
    """The fields of a line; ``None`` for one without an end, or that is no text."""
    try:
        if not line.endswith((b"\n", b"\r")) or b"\0" in line:
            return None
        return next(csv.reader([line.decode()]), None)
    except (UnicodeDecodeError, csv.Error):
        return None


def _entry(row: list[str]) -> tuple[int, float] | None:
    if len(row) != 3 or not _STEP.fullmatch(row[0]) or not row[1] or not _VALUE.fullmatch(row[2]):
        return None
    return int(row[0]), float(row[2])


def _require_log(path: Path, line: bytes, row: list[str] | None) -> None:
    header = ",".join(COLUMNS).encode()
    if row != list(COLUMNS) and not (row is None and header.startswith(line)):
        raise ArtifactError(f"{path} is no log: it does not begin with {header.decode()!r}")
