"""Backends that fail, hang or are slow, full disks, budgets and kills: nothing is lost locally, and it is said once."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tdhook_rl.errors import ArtifactError
from tdhook_rl.report import (
    FileSink,
    FolderSink,
    Histogram,
    Image,
    LoggerSink,
    Sinks,
)
from tests.monitoring import said


class Faulty:
    """A logger that fails, or takes its time, when told to."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.failing = False
        self.gate = threading.Event()
        self.gate.set()
        self.poison: int | None = None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.gate.wait(30)
        if self.failing or step == self.poison:
            raise ConnectionError("no route to host")
        self.rows.append((step, metrics))


def make(logger: Any, tmp_path: Path, **options: Any) -> Sinks:
    return Sinks(FolderSink(tmp_path), LoggerSink(logger), **options)


def test_a_backend_that_fails_is_said_once_and_recovers(tmp_path: Path) -> None:
    logger = Faulty()
    sinks = make(logger, tmp_path)
    sinks.log({"a": 0.0}, 0)
    logger.failing = True
    with pytest.warns(UserWarning, match="Faulty failed .ConnectionError: no route to host.: local files go on"):
        sinks.log({"a": 1.0}, 1)
    for step in range(2, 6):
        sinks.log({"a": float(step)}, step)  # a second warning would be an error here
    logger.failing = False
    sinks.log({"a": 6.0}, 6)
    sinks.log({"a": 7.0}, 7)
    sinks.close()
    assert sorted(step for step, _ in logger.rows) == list(range(8))  # what was missed was handed on
    assert [step for step, _ in FileSink.read(tmp_path / "log.csv")["a"]] == list(range(8))


def test_one_call_that_a_backend_refuses_does_not_hold_up_the_others(tmp_path: Path) -> None:
    logger = Faulty()
    logger.poison = 2
    sinks = make(logger, tmp_path)
    with said() as told:
        for step in range(6):
            sinks.log({"a": float(step)}, step)
        sinks.close()
    assert [str(one.message).split(" (")[0] for one in told] == ["Faulty failed"]
    assert sorted(step for step, _ in logger.rows) == [0, 1, 3, 4, 5]
    assert sinks.others[0].left_out == 1


def test_a_backend_that_hangs_stops_nothing(tmp_path: Path) -> None:
    logger = Faulty()
    sinks = make(logger, tmp_path, patience=0.1)
    sinks.log({"a": 0.0}, 0)
    logger.gate.clear()
    start = time.monotonic()
    with pytest.warns(UserWarning, match="Faulty takes longer than 0.1 s: training and local files go on"):
        sinks.log({"a": 1.0}, 1)
    for step in range(2, 50):
        sinks.log({"a": float(step)}, step)
    assert time.monotonic() - start < 3.0  # a tenth of a second for each would be more
    logger.gate.set()
    sinks.close()
    assert [step for step, _ in logger.rows] == list(range(50))  # in order, and all of them


def test_a_backend_that_never_comes_back_is_left(tmp_path: Path) -> None:
    logger = Faulty()
    logger.gate.clear()
    sinks = make(logger, tmp_path, patience=0.05)
    with pytest.warns(UserWarning, match="takes longer"):
        sinks.log({"a": 0.0}, 0)
    with pytest.warns(UserWarning, match="did not end within 0.1 s, and is left; local files are complete"):
        sinks.others[0].close(timeout=0.1)
    sinks.local[0].close()
    logger.gate.set()


@pytest.mark.parametrize("failing", [True, False], ids=["fails", "is slow"])
def test_a_sink_that_is_called_as_it_is_gets_a_thread_when_it_needs_one(failing: bool, tmp_path: Path) -> None:
    """As those of W&B runs and TensorBoard writers, which hand over to a process or thread of their own."""
    logger = Faulty()
    sink = LoggerSink(logger)
    sink.prompt = True
    sinks = Sinks(FolderSink(tmp_path), sink, patience=0.1)
    before = set(threading.enumerate())  # those of tests before may end meanwhile
    sinks.log({"a": 0.0}, 0)
    assert set(threading.enumerate()) <= before
    if failing:
        logger.failing = True
        match = "Faulty failed"
    else:
        logger.gate.clear()
        threading.Timer(0.3, logger.gate.set).start()
        match = "takes longer than 0.1 s"
    with pytest.warns(UserWarning, match=match):
        sinks.log({"a": 1.0}, 1)
    logger.failing = False
    logger.gate.clear()
    start = time.monotonic()
    with said():
        for step in range(2, 30):
            sinks.log({"a": float(step)}, step)
    assert time.monotonic() - start < 2.0
    logger.gate.set()
    sinks.close()
    assert sorted(step for step, _ in logger.rows) == list(range(30))


def test_failing_every_third_call(tmp_path: Path) -> None:
    """Failing every third call, at random moments for the thread: nothing is lost, and nothing twice."""
    logger = Faulty()
    sinks = make(logger, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(300):
            logger.failing = step % 3 == 1
            sinks.log({"a": float(step)}, step)
        logger.failing = False
        sinks.log({"a": 300.0}, 300)
        sinks.close()
    assert sorted(step for step, _ in logger.rows) == list(range(301))


def test_a_full_disk_cuts_no_picture_and_is_said_once(tmp_path: Path) -> None:
    sinks = Sinks(FolderSink(tmp_path))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with said() as told:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            for step in range(4):
                sinks.log({"map": Image(noise), "all": Histogram.of(noise), "a": 1.0}, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sinks.log({"map": Image(noise), "all": Histogram.of(noise)}, 4)
    sinks.close()
    assert len(told) == 1
    assert "cannot be written (File too large): 'map'" in str(told[0].message)
    assert [path.name for path in (tmp_path / "media" / "map").iterdir()] == ["000000004.png"]
    Pillow.open(tmp_path / "media" / "map" / "000000004.png").verify()
    lines = (tmp_path / "histograms.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4
    assert len(FileSink.read(tmp_path / "log.csv")["a"]) == 4


def test_the_budget_of_bytes_and_of_names(tmp_path: Path) -> None:
    logger = Faulty()
    sinks = Sinks(FolderSink(tmp_path, most_bytes=1500), LoggerSink(logger), most_keys=20)
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with said() as told:
        for step in range(3):
            sinks.log({f"concept {number}": 0.5 for number in range(3000)}, step)
            sinks.log({"map": Image(noise)}, step)
    sinks.close()
    words = [str(one.message) for one in told]
    assert sum("there are more than 20 names to log (budget): 'concept 20' and others" in one for one in words) == 1
    assert sum("holds the 1.5e+03 bytes of media that are allowed (budget)" in one for one in words) == 1
    assert {len(row) for _, row in logger.rows} == {20}
    assert len(FileSink.read(tmp_path / "log.csv")) == 3000
    assert sum(path.stat().st_size for path in (tmp_path / "media").rglob("*.png")) <= 1500


def test_a_kill_leaves_whole_files(tmp_path: Path) -> None:
    code = """
        import sys, numpy as np, wandb
        from pathlib import Path
        from tdhook_rl.report import Animation, Histogram, Image
        from tdhook_rl.report.sinks import sinks_of
        run = wandb.init(mode="offline", dir=sys.argv[1], project="p",
                         settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True))
        sinks, noise = sinks_of(run, Path(sys.argv[1]) / "local"), np.random.default_rng(0)
        print("ready", flush=True)
        for step in range(10**6):
            frames = noise.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
            sinks.log({"a": step / 7, "map": Image(frames[0]), "all": Histogram.of(frames),
                       "episode": Animation(frames)}, step)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "local" / "media").rglob("*.png"))) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    local = tmp_path / "local"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line may have been cut
        curve = FileSink.read(local / "log.csv")["a"]
    assert curve == [(step, step / 7) for step in range(len(curve))]
    assert len(curve) >= 20
    for path in [*local.rglob("*.png"), *local.rglob("*.gif")]:
        with Pillow.open(path) as picture:
            for frame in range(getattr(picture, "n_frames", 1)):
                picture.seek(frame)
                picture.load()
    resumed = FolderSink(local, resume=True)  # and the run can go on
    resumed.log({"a": 0.5}, 10**6)
    resumed.close()
    assert FileSink.read(local / "log.csv")["a"][-1] == (10**6, 0.5)


@pytest.mark.parametrize("rest", ["3,loss,0.6", "3,lo", ""])
def test_a_log_goes_on_after_its_last_whole_line(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"step,name,value\n1,loss,0.5\n{rest}")
    with pytest.raises(ArtifactError, match="exists already"):
        FileSink(path)
    sink = FileSink(path, resume=True)
    sink.log({"loss": 0.25}, 4)
    sink.close()
    assert FileSink.read(path) == {"loss": [(1, 0.5), (4, 0.25)]}


def test_another_file_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match="is no log"):
        FolderSink(tmp_path, resume=True)
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,2\n"
