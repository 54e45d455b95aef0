"""An analysis is killed between any two of its writes, in the middle of one, or loses power there; then it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdhook_rl.errors import TdhookError
from tests.faults.disk import Disk, Operation, rebuilt
from tests.faults.fault import NAMED, RESUMABLE, WHOLE, Fault, Kind, Wrong
from tests.faults.writers import ROWS, analysed, damaged, results_in, stopped

#: What an analysis finds in its folder, and of which rows it is.
BEGUN: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "a new analysis": (lambda folder: None, {}),
    "an analysis of some rows": (lambda folder: None, {"rows": torch.arange(0, ROWS, 2)}),
    "an analysis that goes on": (stopped, {}),
    "an analysis that is mended": (damaged, {}),
}


def kinds() -> dict[str, Kind]:
    """A kill between two operations, a kill within a write, and a loss of power."""
    return {
        "kills between writes of an analysis": partial(_all, "kill"),
        "kills within writes of an analysis": partial(_all, "torn"),
        "losses of power in an analysis": partial(_all, "power"),
    }


def _all(how: str, folder: Path) -> Iterator[Fault]:
    for name, (before, options) in BEGUN.items():
        base, place = (folder / f"{name} {part}" for part in ("before", "now"))
        base.mkdir()
        before(base / "found")
        shutil.copytree(base, place)
        with Disk(place) as disk:
            analysed(place / "found", **options)
        expected = _whole(place / "found")
        for count in range(len(disk.done) + 1):
            operations = disk.done[:count]
            if how == "torn":
                if count == len(disk.done) or len(disk.done[count].content) < 2 or disk.done[count].kind == "appear":
                    continue
                last = disk.done[count]
                operations = [*operations, Operation(last.kind, last.path, last.content[: len(last.content) // 2],
                                                     last.start)]  # fmt: skip
            what = f"{name}: {how} after {count} of {len(disk.done)} operations"
            lost = how == "power"
            yield Fault(what, partial(_try, operations, base, options, expected, lost))


def _try(
    operations: list[Operation], base: Path, options: dict[str, Any], expected: Any, lost: bool, folder: Path
) -> str:
    place = folder / "place"
    rebuilt(operations, base, place, lost=lost)
    before = _read(place / "found")
    if not isinstance(before, Exception) and before != expected:
        raise Wrong("what is there after the crash is read as finished, and is something else")
    try:
        analysed(place / "found", **options)
    except TdhookError:
        return NAMED
    if (found := _read(place / "found")) != expected:
        raise Wrong(f"the same call again gives {found!r:.300}")
    return WHOLE if before == expected else RESUMABLE


def _read(folder: Path) -> Any:
    try:
        return _whole(folder)
    except TdhookError as error:
        return error


def _whole(folder: Path) -> dict[str, Any]:
    """Everything that is there, but for the time that it was made."""
    found: dict[str, Any] = dict(results_in(folder))
    manifest = json.loads((folder / "analysis.json").read_text())
    manifest["facts"].pop("time")
    return found | {"manifest": manifest, "files": sorted(str(one.relative_to(folder)) for one in folder.rglob("*"))}
