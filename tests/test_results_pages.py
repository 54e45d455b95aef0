"""Pages and files of results that were changed by other hands."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdhook_rl.errors import ArtifactError
from tdhook_rl.replay import load_results
from tdhook_rl.replay.manifest import Manifest, block_of
from tests.kept_analysis import ROWS, is_right, run


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: manifest | fields


def entry(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: manifest | {"keys": [manifest["keys"][0] | fields, *manifest["keys"][1:]]}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {key: value for key, value in manifest.items() if key != name}


ODD = {"true": True, "null": None, "a word": "x", "NaN": float("nan"), "infinite": float("inf"), "half": 0.5,
       "negative": -1, "huge": 1 << 70, "a list": [1], "a mapping": {"a": 1}}  # fmt: skip
FIELDS = ("entries", "done", "batch_size", "keys", "facts", "block", "checksums", "format")
DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"{field} is {name}": changed(**{field: value}) for field in FIELDS for name, value in ODD.items()
       if not (field == "facts" and name == "a mapping")},
    **{f"the {field} of a key is {name}": entry(**{field: value}) for field in ("key", "shape", "dtype")
       for name, value in ODD.items()},
    **{f"no {field}": without(field) for field in FIELDS},
    "one more field": changed(more=1),
    "done is zero": changed(done=0),
    "more entries": changed(entries=6000, batch_size=[6000]),
    "fewer entries": changed(entries=300, done=300, batch_size=[300]),
    "another batch": changed(batch_size=[ROWS, 2]),
    "a key twice": lambda manifest: manifest | {"keys": [manifest["keys"][0]] * len(manifest["keys"])},
    "a key outside": entry(key=["..", "..", "x"]),
    "a key of the root": entry(key=["/etc/passwd"]),
    "a key with an end of text": entry(key=["a\0b"]),
    "an empty key": entry(key=[]),
    "a shape that overflows": entry(shape=[ROWS, 1 << 40, 1 << 40]),
    "a shape of another size": entry(shape=[ROWS, 5]),
    "a dtype that is a function": entry(dtype="load"),
    "a dtype of another size": entry(dtype="float64"),
    "smaller blocks": changed(block=10),
    "a checksum that is none": lambda old: old | {"checksums": [[1 << 40] * len(one) for one in old["checksums"]]},
    "an older format": changed(format="tdhook_rl.analysis/0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "results"
    run(folder)
    return folder


def refused(folder: Path, go_on: bool = True) -> None:
    with pytest.raises(ArtifactError):
        load_results(folder)
    if go_on:
        with pytest.raises(ArtifactError):
            run(folder)


@pytest.mark.limit(10)
@pytest.mark.parametrize("damage", DAMAGES)
def test_fields_of_the_page(damage: str, finished: Path) -> None:
    manifest = finished / "analysis.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps(DAMAGES[damage](json.loads(before))))
    try:
        # One of which nothing is done is begun again.
        refused(finished, go_on=damage != "done is zero")
    finally:
        manifest.write_text(before)


TEXTS = {"deep": "[" * 100_000, "deep and closed": "[" * 100_000 + "]" * 100_000, "empty": "", "a list": "[]",
         "a word": '"x"', "null": "null", "a number of a million digits": '{"entries": ' + "1" * 1_000_000 + "}",
         "no text": "\udcff", "cut": '{"entries": 30'}  # fmt: skip


@pytest.mark.limit(10)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_the_page(name: str, finished: Path) -> None:
    manifest = finished / "analysis.json"
    before = manifest.read_text()
    manifest.write_bytes(TEXTS[name].encode(errors="surrogateescape"))
    try:
        refused(finished)
    finally:
        manifest.write_text(before)


@pytest.mark.limit(10)
@pytest.mark.parametrize("target", ["analysis.json", "cache/1.memmap"])
@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to nothing", "socket"])
def test_files_that_are_none(what: str, target: str, finished: Path) -> None:
    path = finished / target
    before = path.read_bytes()
    path.unlink()
    try:
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            path.symlink_to("/dev/zero" if what == "device" else "/nowhere")
        refused(finished)
        if what in ("pipe", "folder", "socket") and target != "analysis.json":
            with pytest.raises(ArtifactError, match=r"1\.memmap is no regular file"):
                load_results(finished)
    finally:
        path.rmdir() if what == "folder" else path.unlink()
        path.write_bytes(before)


def test_results_of_the_version_before(finished: Path, tmp_path: Path) -> None:
    """Finished ones are read; those that are not have no checksums, and are refused by name."""
    right, folder = run(tmp_path / "right").clone(), tmp_path / "old"
    run(folder)
    manifest = json.loads((folder / "analysis.json").read_text())
    old = {key: manifest[key] for key in ("entries", "done", "batch_size", "keys", "facts")}
    old["format"] = "tdhook_rl.analysis/1"
    (folder / "analysis.json").write_text(json.dumps(old))
    assert is_right(load_results(folder), right)
    assert is_right(run(folder), right)
    with pytest.raises(ArtifactError, match=r"has no checksums: an earlier version \(tdhook_rl.analysis/1\)"):
        load_results(folder, verify=True)
    (folder / "analysis.json").write_text(json.dumps(old | {"done": 900}))
    with pytest.raises(ArtifactError, match="begun by an earlier version"):
        run(folder)


def test_large_buffers_have_small_pages() -> None:
    for entries in (1, 256, 10_000, 1_000_000, 10**9):
        manifest = Manifest(entries, entries, [entries], [], {}, block_of(entries))
        assert manifest.blocks() <= 1024
