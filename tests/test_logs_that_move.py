"""Logs that are removed, moved or replaced while they are written, and two runs that would write into one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl.errors import ArtifactError
from tdhook_rl.report import FileSink, FolderSink, Histogram, Image, Sinks, read_run
from tdhook_rl.report.sinks.together import sinks_of
from tests.monitoring import said


def replaced(folder: Path) -> None:
    (folder / "other.csv").write_text("step,name,value\n0,loss,9.0\n")
    (folder / "other.csv").replace(folder / "log.csv")


#: What becomes of a folder after step 1; where its log is then, and what the log has before step 2.
CHANGES: dict[str, tuple[Callable[[Path], Any], str | None, list[tuple[int, float]]]] = {
    "removed": (lambda folder: (folder / "log.csv").unlink(), None, []),
    "moved": (lambda folder: (folder / "log.csv").rename(folder / "old.csv"), "run/old.csv", []),
    "replaced": (replaced, None, [(0, 9.0)]),
    "emptied": (lambda folder: (folder / "log.csv").write_text(""), None, []),
    "its folder removed": (shutil.rmtree, None, []),
    "its folder moved": (lambda folder: folder.rename(folder.with_name("old")), "old/log.csv", []),
}


@pytest.mark.parametrize("alone", [True, False], ids=["a file", "a folder"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_follows_is_where_a_reader_looks(name: str, alone: bool, tmp_path: Path) -> None:
    change, old, before = CHANGES[name]
    folder = tmp_path / "run"
    folder.mkdir()
    sink: Any = FileSink(folder / "log.csv") if alone else FolderSink(folder)
    media = {} if alone else {"all": Histogram.of([1.0, 2.0]), "map": Image([[0.0, 1.0]])}
    with said() as told:
        if not alone:
            sink.describe({"seed": 3})
        sink.log({"loss": 1.0, **media}, 1)
        change(folder)
        for step in (2, 3):
            sink.log({"loss": float(step), **media}, step)
        sink.close()
    assert FileSink.read(folder / "log.csv") == {"loss": [*before, (2, 2.0), (3, 3.0)]}
    assert old is None or FileSink.read(tmp_path / old) == {"loss": [(1, 1.0)]}
    (words,) = [str(one.message) for one in told]
    assert "while it was written: from step 2 on the log goes on in" in words
    assert ("replaced" in words) == (name in ("replaced", "emptied"))
    if not alone:
        run = read_run(folder)
        assert run.config == {"seed": 3}
        assert [one.step for one in run.histograms["all"]][-2:] == [2, 3]
        assert [one.step for one in run.pictures["map"]][-2:] == [2, 3]


def test_what_is_no_log_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    sink = FileSink(path)
    path.unlink()
    path.write_text("a,b\n1,2\n")
    with said() as told:
        sink.log({"loss": 0.5}, 1)
        sink.log({"loss": 0.5}, 2)
    assert "cannot be written" in str(told[0].message)
    assert "is no log" in str(told[0].message)
    assert len(told) == 1
    assert path.read_text() == "a,b\n1,2\n"
    path.unlink()
    with pytest.warns(UserWarning, match="removed or moved|replaced"):
        sink.log({"loss": 0.25}, 3)
    sink.close()
    assert FileSink.read(path) == {"loss": [(3, 0.25)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file that nobody closes
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("where", ["this process", "another"])
def test_a_folder_is_one_runs_at_a_time(where: str, resume: bool, tmp_path: Path) -> None:
    first = FolderSink(tmp_path)
    first.log({"loss": 0.5}, 1)
    if where == "another":  # to the system, whoever opened the folder by itself
        first.close()
        descriptor = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ArtifactError, match=r"another log is under way in .*: close it, or name another folder"):
        FolderSink(tmp_path, resume=resume)
    if where == "another":
        os.close(descriptor)
    else:
        first.log({"loss": 0.25}, 2)
        del first  # nobody has it any more
    with pytest.raises(ArtifactError, match="exists already"):
        FolderSink(tmp_path)
    second = FolderSink(tmp_path, resume=True)
    second.log({"loss": 0.125}, 3)
    second.close()
    found = [(1, 0.5), (3, 0.125)] if where == "another" else [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert FileSink.read(tmp_path / "log.csv") == {"loss": found}


@pytest.mark.parametrize("beside", [True, False], ids=["one folder of a logger", "no logger"])
def test_runs_that_are_not_told_where_to_write_get_a_folder_each(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tdhook_rl.report.sinks.together.time.strftime", lambda _: "now")  # within one second
    several: list[Sinks] = []
    with said() as told:
        for number in range(3):
            sinks = sinks_of(CSVLogger("run", log_dir=str(tmp_path)) if beside else None)
            sinks.log({"loss": float(number)}, number)
            several.append(sinks)
        for sinks in several:
            sinks.close()
        again = sinks_of(CSVLogger("run", log_dir=str(tmp_path)) if beside else None)
        again.close()
    folders = [sinks.local[0].path for sinks in several]
    names = ["interp", "interp2", "interp3"] if beside else ["now", "now-2", "now-3"]
    assert [folder.name for folder in folders] == names
    assert again.local[0].path.name == ("interp" if beside else "now-4")
    for number, folder in enumerate(folders):
        assert FileSink.read(folder / "log.csv") == {"loss": [(number, float(number))]}
    words = [str(one.message) for one in told if "another log is under way in" in str(one.message)]
    assert [one.rpartition("/")[2] for one in words] == (names[1:] if beside else [])


def test_a_log_that_goes_back_is_said(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    for step in (1, 2, 3, 2, 3, 4):
        sink.log({"loss": 0.5, "other": 0.5}, step)
    sink.close()
    (words,) = read_run(tmp_path).warnings
    assert "the log goes back from step 3 to 2" in words
