"""Files that others have written, or a disk has changed: cut, flipped, pickled, compressed, of impossible shapes."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensordict import TensorDict

from tdhook_rl import LinearProbe
from tdhook_rl.errors import TdhookError
from tdhook_rl.files.checkpoints import state_of
from tdhook_rl.reading.reader import Reader
from tdhook_rl.replay import load_parquet, to_parquet
from tdhook_rl.report import FileSink, Player
from tdhook_rl.report.page.findings_file import load_findings, save_findings
from tdhook_rl.sweeps import SteeringVector, SweepResult
from tests.faults.fault import AS_IT_IS, NAMED, WHOLE, Fault, Kind, Wrong
from tests.faults.writers import (
    FINDING,
    PROBE,
    VECTOR,
    _episodes,
    _player,
    _result,
    _results,
    analysed,
    results_in,
)

#: How many places of a file are cut, flipped or blanked.
CUTS, FLIPS, BLANKS = 8, 24, 6
#: Bytes that reading a damaged file may take more than reading it whole.
MOST = 100 << 20


@dataclass(frozen=True)
class Subject:
    """Something that is read.

    Attributes:
        write: into a folder.
        read: what a reader gets, to be compared by ``==``.
        files: which of the files are damaged.
        exact: whether any change of a number is noticed; formats of others, and lines of text, have no checksums.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    exact: bool = True


def _plain(value: Any) -> Any:
    if isinstance(value, TensorDict):
        return {str(key): one.tolist() for key, one in value.items(True, True)}
    return {name: one.tolist() for name, one in value.items()}


def _log(folder: Path) -> None:
    sink = FileSink(folder / "log.csv")
    for step in range(20):
        sink.log({"loss": step / 4}, step)
    sink.close()


def _memmap(folder: Path) -> None:
    data = TensorDict({"observation": torch.arange(60.0).reshape(20, 3), "label": torch.arange(20)}, [20])
    data.memmap(folder / "rows")


def _saved(folder: Path) -> None:
    torch.save({"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}, folder / "w.pt")


SUBJECTS: dict[str, Subject] = {
    "a probe": Subject(lambda folder: PROBE.save(folder / "p"),
                       lambda folder: _plain({"weight": LinearProbe.load(folder / "p").weight}),
                       ("p.safetensors",)),
    "a vector": Subject(lambda folder: VECTOR.save(folder / "v"),
                        lambda folder: repr(SteeringVector.load(folder / "v")), ("v.safetensors",)),
    "a sweep": Subject(lambda folder: _result().save(folder),
                       lambda folder: _plain(SweepResult.load(folder).values), ("sweep.safetensors",)),
    "an analysis": Subject(lambda folder: analysed(folder / "found"), lambda folder: results_in(folder / "found"),
                           ("found/analysis.json", "found/cache/1.memmap", "found/attr/observation.memmap")),
    "a file of Parquet": Subject(lambda folder: to_parquet(_results(), folder / "a.parquet", chunk=16),
                                 lambda folder: _plain(load_parquet(folder / "a.parquet")), ("a.parquet",)),
    "a data set of Parquet": Subject(
        lambda folder: to_parquet(_results(), folder / "set", _episodes(), chunk=16),
        lambda folder: _plain(load_parquet(folder / "set")["attr"]), ("set/data/chunk-000/file-000.parquet",)),
    "rows that others mapped": Subject(_memmap, lambda folder: _plain(Reader(folder / "rows").read(torch.arange(20))),
                                       ("rows/meta.json", "rows/observation.memmap"), exact=False),
    "a checkpoint": Subject(_saved, lambda folder: _plain(state_of(folder / "w.pt")), ("w.pt",), exact=False),
    "a checkpoint of safetensors": Subject(
        lambda folder: save_file({"weight": torch.arange(12.0)}, folder / "w.safetensors"),
        lambda folder: _plain(state_of(folder / "w.safetensors")), ("w.safetensors",), exact=False),
    "findings": Subject(lambda folder: save_findings(folder, [FINDING]),
                        lambda folder: repr(load_findings(folder / "findings.json")), ("findings.json",), exact=False),
    "a log": Subject(_log, lambda folder: FileSink.read(folder / "log.csv"), ("log.csv",), exact=False),
    "a player": Subject(lambda folder: _player().record(folder),
                        lambda folder: Player.load(folder).fragment(with_code=False), ("players/player.json",
                                                                                      "players/player.bin")),
}  # fmt: skip


# ------------------------------------------------------------------ damages

Damage = Callable[[bytes, random.Random, Path], bytes]


def _cut(content: bytes, rng: random.Random, marker: Path) -> bytes:
    return content[: rng.randrange(len(content))]


def _flip(content: bytes, rng: random.Random, marker: Path) -> bytes:
    place, changed = rng.randrange(len(content)), bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _blank(content: bytes, rng: random.Random, marker: Path) -> bytes:
    place, changed = rng.randrange(len(content)), bytearray(content)
    changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    return bytes(changed)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.marker), os.O_CREAT | os.O_WRONLY)


def _pickled(content: bytes, rng: random.Random, marker: Path) -> bytes:
    return pickle.dumps(_Touch(marker))


def _saved_object(content: bytes, rng: random.Random, marker: Path) -> bytes:
    place = marker.with_suffix(".object")
    torch.save({"weight": _Touch(marker)}, place)
    return place.read_bytes()


def _bomb(content: bytes, rng: random.Random, marker: Path) -> bytes:
    return _zipped(marker.with_suffix(".zip"))


def _zipped(place: Path) -> bytes:
    """What unfolds to 300 MB."""
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("archive/data.pkl", "archive/data/0"):
            with file.open(name, "w", force_zip64=True) as entry:
                for _ in range(150):
                    entry.write(bytes(1 << 20))
        file.writestr("archive/version", "3\n")
    return place.read_bytes()


def _header(header: Any, length: int | None = None) -> Damage:
    def damage(content: bytes, rng: random.Random, marker: Path) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)

    return damage


def _entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, Damage] = {
    "a header of 2^63 bytes": _header({}, (1 << 63) - 1),
    "a header longer than the file": _header({}, 1 << 20),
    "a shape of 2^60 numbers": _header({"weight": _entry([1 << 60], 0, 64)}),
    "a shape that overflows": _header({"weight": _entry([1 << 40, 1 << 40], 0, 64)}),
    "offsets beyond the end": _header({"weight": _entry([1 << 20], 0, 1 << 22)}),
    "offsets that go back": _header({"weight": _entry([4], 32, 16)}),
    "tensors in the same place": _header({"weight": _entry([4], 0, 16), "bias": _entry([4], 0, 16)}),
    "an unknown dtype": _header({"weight": _entry([4], 0, 16, "OBJECT")}),
    "a key twice": _header(b'{"weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, '
                           b'"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    "a header that is deep": _header(b"[" * 50_000 + b"]" * 50_000),
    "metadata that is no text": _header({"__metadata__": {"tdhook_rl": 7}}),
}  # fmt: skip


def _json(change: Callable[[dict[str, Any], str], Any]) -> Damage:
    def damage(content: bytes, rng: random.Random, marker: Path) -> bytes:
        text = content.decode()
        found = change(json.loads(text), text)
        return (found if isinstance(found, str) else json.dumps(found)).encode()

    return damage


def _leading(document: dict[str, Any], text: str) -> Any:
    """Every text is a path out of the folder."""
    if isinstance(document, dict):
        return {key: _leading(value, text) for key, value in document.items()}
    if isinstance(document, list):
        return [_leading(value, text) for value in document]
    return "../../../etc/passwd" if isinstance(document, str) else document


def _huge(document: Any, text: str) -> Any:
    if isinstance(document, dict):
        return {key: _huge(value, text) for key, value in document.items()}
    if isinstance(document, list):
        return [_huge(value, text) for value in document]
    return 1 << 61 if isinstance(document, int) and not isinstance(document, bool) else document


def _twice(document: Any, text: str) -> str:
    """The first key of the document stands there twice."""
    start = text.index("{") + 1
    if not isinstance(document, dict):
        document = document[0]
    name = next(iter(document))
    return f"{text[:start]}{json.dumps(name)}: 0, {text[start:]}"


DOCUMENTS: dict[str, Damage] = {
    "paths that lead elsewhere": _json(_leading), "numbers that are huge": _json(_huge), "a key twice": _json(_twice),
    "NaN": _json(lambda document, text: text.replace(": 1", ": NaN").replace(": 0", ": NaN")),
    "a list": _json(lambda document, text: [document]), "null": _json(lambda document, text: "null"),
    "deep": _json(lambda document, text: "[" * 100_000),
}  # fmt: skip


def kinds() -> dict[str, Kind]:
    return {"damaged files": partial(_all, False), "hostile files": partial(_all, True)}


def _all(hostile: bool, folder: Path) -> Iterator[Fault]:
    for name, subject in SUBJECTS.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        subject.write(place)
        expected = subject.read(place)
        for file in subject.files:
            damages: dict[str, Damage] = {}
            if hostile:
                damages |= {"a pickle": _pickled, "an object of torch.save": _saved_object, "a zip bomb": _bomb}
                damages |= HEADERS if file.endswith(".safetensors") else {}
                damages |= DOCUMENTS if file.endswith(".json") else {}
            else:
                damages |= {f"cut {number}": _cut for number in range(CUTS)} | {"empty": lambda *_: b""}
                damages |= {f"flipped {number}": _flip for number in range(FLIPS)}
                damages |= {f"blank {number}": _blank for number in range(BLANKS)}
            for word, damage in damages.items():
                what = f"{name}, {file}: {word}"
                yield Fault(what, partial(_try, subject, place, file, damage, expected, what))


def _try(subject: Subject, whole: Path, file: str, damage: Damage, expected: Any, what: str, folder: Path) -> str:
    place, marker = folder / "place", folder / "marker"
    shutil.copytree(whole, place)
    path = place / file
    content = path.read_bytes()
    path.write_bytes(damage(content, random.Random(what), marker))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Any = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = subject.read(place)
        except TdhookError as error:
            found = error
    if marker.exists():
        raise Wrong("it was unpickled")
    if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10) > MOST:
        raise Wrong(f"reading it took {grown >> 20} MB")
    if isinstance(found, TdhookError):
        return NAMED
    if found == expected:
        return WHOLE
    if subject.exact:
        raise Wrong(f"it is read as {found!r:.200}")
    return NAMED if told else AS_IT_IS
