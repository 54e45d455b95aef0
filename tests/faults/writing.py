"""Every operation of every writer fails once: on a full disk, with an error of the disk, half done, or cut short."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tdhook_rl.errors import TdhookError
from tests.faults.disk import WAYS, Disk
from tests.faults.fault import NAMED, RESUMABLE, WHOLE, Fault, Kind, Wrong
from tests.faults.writers import WRITERS, Writer


def kinds() -> dict[str, Kind]:
    """For each room, the faults of its writers."""
    return {f"writes of {room}": partial(_of_room, room) for room in WRITERS}


def _of_room(room: str, folder: Path) -> Iterator[Fault]:
    for name, writer in WRITERS[room].items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        writer.before(place)
        with Disk(place) as disk:
            writer.write(place)
        expected = writer.read(place)
        for number, operation in enumerate(disk.counted):
            for way in WAYS:
                if way in ("half", "short") and len(operation.content) < 2 and operation.kind != "native":
                    continue
                what = f"{name}: {operation.kind} {operation.path} ({number}) fails with {way}"
                yield Fault(what, partial(_try, writer, number, way, expected))


def _try(writer: Writer, number: int, way: str, expected: Any, folder: Path) -> str:
    place = folder / "place"
    shutil.rmtree(folder, ignore_errors=True)
    place.mkdir(parents=True)
    writer.before(place)
    before = _read(writer, place)
    failed: Exception | None = None
    with Disk(place, number, way) as disk:
        try:
            writer.write(place)
        except (TdhookError, *writer.errors) as error:
            failed = error
    found = _read(writer, place)
    if disk.failed is None or failed is None:
        if found == expected:
            return WHOLE
        if writer.partly is not None and isinstance(found, dict) and writer.partly(found, expected):
            return NAMED  # with a warning
        raise Wrong(f"nothing was raised, and what is read is {_beside(found, expected)}")
    if not isinstance(found, Exception) and found not in (before, expected):
        raise Wrong(f"after {failed}, what is read is neither the old nor the new: {found!r:.200}")
    if isinstance(before, Exception) is False and isinstance(found, Exception):
        raise Wrong(f"after {failed}, what was there before cannot be read any more: {found}")
    try:
        writer.write(place)
    except (TdhookError, *writer.errors):
        return NAMED
    if (found := _read(writer, place)) != expected:
        raise Wrong(f"the same call again gives {found!r:.200}")
    if left := [str(one.relative_to(place)) for one in place.rglob("*") if one.name.endswith(".new")]:
        raise Wrong(f"the same call again leaves {left}")
    return RESUMABLE


def _read(writer: Writer, place: Path) -> Any:
    """What a reader gets, or the error that it gets."""
    try:
        return writer.read(place)
    except (TdhookError, OSError) as error:
        return error


def _beside(found: Any, expected: Any) -> str:
    """What differs, for a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return ", ".join(f"{name}: {found.get(name, 'absent')!r:.60}" for name in odd)
    return f"{found!r:.200}"
