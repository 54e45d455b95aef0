"""Sinks: what was logged is in the folder and in each backend, record by record, whatever fails meanwhile."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image as Pillow
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.wandb import WandbLogger

from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.report import (
    Animation,
    Artifact,
    DataTable,
    FileSink,
    FolderSink,
    Histogram,
    Image,
    LoggerSink,
    Sinks,
    WandbSink,
)
from tdhook_rl.report.frames import as_frames
from tdhook_rl.report.sinks.names import Tags
from tdhook_rl.report.sinks.together import sinks_of
from tests.wandb_reader import finished, records

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    found = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    yield found
    found.finish()


def rows_of(run: Any) -> list[dict[str, Any]]:
    """The rows of a run that is finished, without W&B's own entries."""
    rows = [{name: value for name, value in row.items() if name[0] != "_"} for row in finished(run)]
    return [row for row in rows if row]


@contextmanager
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


def some_media(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "probe.json").write_text("{}")
    return {
        "activation": Histogram.of([0.0, 1.0, 1.0, float("nan")], bins=4),
        "overlay": Image(torch.rand(3, 8, 6), caption="step 1"),
        "episode": Animation(torch.randint(0, 255, (5, 9, 7, 3), dtype=torch.uint8)),
        "worst": DataTable(["episode", "return"], [[1, -0.5], ["two", float("nan")]]),
        "probe": Artifact([tmp_path / "probe.json"], "probe", {"accuracy": 0.9}, ["best"]),
    }


# ------------------------------------------------------------------ W&B


def test_a_wandb_run_holds_what_the_folder_holds(run: Any, tmp_path: Path) -> None:
    sinks = sinks_of(run, tmp_path / "local")
    sinks.log({"probe.fc2/the door": 0.25, "odd": float("nan"), **some_media(tmp_path)}, 2048)
    sinks.log({"probe.fc2/the door": 0.5}, 4096)
    sinks.describe({"methods": ["Saliency()"]})
    sinks.summarise({"probe.fc2/the door": 0.5})
    sinks.close()
    first, second = rows_of(run)
    assert (first["interp/step"], first["interp/probe.fc2.the door"]) == (2048, 0.25)
    assert "interp/odd" not in first  # in the local file it is, as NaN
    assert second == {"interp/step": 4096, "interp/probe.fc2.the door": 0.5}
    assert first["interp/activation/values"] == [1, 0, 0, 2]
    files = Path(run.settings.sync_dir) / "files"
    local = tmp_path / "local" / "media"
    for name, ending in (("overlay", "png"), ("episode", "gif")):
        assert (files / first[f"interp/{name}/path"]).read_bytes() == (
            local / name / f"000002048.{ending}"
        ).read_bytes()
    table = json.loads((files / first["interp/worst/path"]).read_text())
    assert table["columns"] == ["episode", "return"]
    assert table["data"] == [[1, -0.5], ["two", None]]
    (path,) = Path(run.settings.sync_dir).glob("*.wandb")
    kinds = {record.WhichOneof("record_type"): record for record in records(path)}
    config = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in kinds["config"].config.update}
    assert config["interp"] == {"methods": ["Saliency()"]}
    last = {
        one.key or "/".join(one.nested_key): json.loads(one.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "summary"
        for one in record.summary.update
    }
    assert last["interp/probe.fc2.the door"] == 0.5
    saved = [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    (probe,) = [one for one in saved if one.type == "probe"]
    assert probe.name == "interp-probe"
    assert set(probe.aliases) == {"latest", "best", "f2048"}
    assert [entry.path for entry in probe.manifest.contents] == ["probe.json"]
    metrics = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    assert ("interp/*", "interp/step") in {(one.glob_name, one.step_metric) for one in metrics}


@pytest.mark.parametrize("count", [1, 2])
def test_a_script_that_sets_the_runs_own_step_loses_nothing(count: int, run: Any, tmp_path: Path) -> None:
    """W&B drops a row whose step is behind the run's, in silence."""
    with said() as told:
        sinks = [sinks_of(run, tmp_path / str(number)) for number in range(count)]
    assert len(told) == count - 1
    assert not told or "this one does as interp2/..." in str(told[0].message)
    for update in range(5):
        run.log({"loss": float(update)}, step=update)
        for number, one in enumerate(sinks):
            one.log({"mass": update + 0.25 + number}, 100 * update)
    for one in sinks:
        one.close()
    rows = rows_of(run)
    assert [row["loss"] for row in rows if "loss" in row] == [0.0, 1.0, 2.0, 3.0, 4.0]
    for number in range(count):
        prefix = "interp" if not number else "interp2"
        found = [(row[f"{prefix}/step"], row[f"{prefix}/mass"]) for row in rows if f"{prefix}/mass" in row]
        assert found == [(100 * update, update + 0.25 + number) for update in range(5)]


def test_a_script_that_logs_nothing_and_two_sinks(run: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="as interp/... already"):
        sinks = [sinks_of(run, tmp_path / str(number)) for number in range(2)]
    for step in range(4):
        sinks[1].log({"mass": float(step)}, step)
        sinks[1].log({"share": float(step)}, step)
        if step % 2:
            sinks[0].log({"mass": float(step)}, step)
    for one in sinks:
        one.close()
    rows = rows_of(run)
    assert [row["interp2/mass"] for row in rows if "interp2/mass" in row] == [0.0, 1.0, 2.0, 3.0]
    assert [row["interp2/share"] for row in rows if "interp2/share" in row] == [0.0, 1.0, 2.0, 3.0]
    assert [row["interp/mass"] for row in rows if "interp/mass" in row] == [1.0, 3.0]


def test_torchrls_wandb_logger_goes_on_logging_beside(tmp_path: Path) -> None:
    logger = WandbLogger("x", save_dir=str(tmp_path), mode="offline", log_env_packages=False, settings=QUIET)
    sinks = sinks_of(logger)
    for step in (100, 50):  # going back is no reason to lose a row
        logger.log_scalar("train/loss", step / 100, step=step)
        sinks.log({"mass": step / 100}, step)
    sinks.close()
    logger.log_scalar("train/loss", 0.25, step=150)  # it is still the script's
    rows = rows_of(logger.experiment)
    assert [(row["interp/step"], row["interp/mass"]) for row in rows if "interp/mass" in row] == [(100, 1.0), (50, 0.5)]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1.0, 0.5, 0.25]
    folder = Path(logger.experiment.settings.sync_dir) / "interp"
    assert FileSink.read(folder / "log.csv") == {"mass": [(100, 1.0), (50, 0.5)]}


def test_a_disabled_run_is_a_run(tmp_path: Path) -> None:
    run = wandb.init(mode="disabled", dir=str(tmp_path))
    sinks = sinks_of(run, tmp_path / "local")
    sinks.log({"mass": 0.5, **some_media(tmp_path)}, 1)
    sinks.describe({"seed": 0})
    sinks.summarise({"mass": 0.5})
    sinks.close()
    assert FileSink.read(tmp_path / "local" / "log.csv") == {"mass": [(1, 0.5)]}
    run.finish()


def test_a_run_is_resumed_on_the_same_axis(tmp_path: Path) -> None:
    for part in range(2):
        run = wandb.init(mode="offline", dir=str(tmp_path), project="p", id="same", resume="allow", settings=QUIET)
        sinks = sinks_of(run, tmp_path / "local", resume=bool(part))
        sinks.log({"mass": float(part), "map": Image(np.zeros((4, 4)))}, 10 * part)
        sinks.close()
        assert [row["interp/step"] for row in rows_of(run)] == [10 * part]
        time.sleep(1.1)  # W&B's folders are told apart by the second
    assert FileSink.read(tmp_path / "local" / "log.csv") == {"mass": [(0, 0.0), (10, 1.0)]}
    assert len(list((tmp_path / "local" / "media" / "map").iterdir())) == 2


# ------------------------------------------------------------------ other backends


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torchrl.record.loggers.tensorboard import TensorboardLogger

    logger = TensorboardLogger("run", log_dir=str(tmp_path))
    sinks = sinks_of(logger)
    with said() as told:
        sinks.log({"probe/the door": 0.25, "probe/the_door": 0.5, **some_media(tmp_path)}, 2048)
        sinks.log({**some_media(tmp_path)}, 4096)
    sinks.close()
    assert sorted(str(one.message).split(":")[0] for one in told) == [
        f"TensorboardLogger shows no {kind}" for kind in ("animation", "artifact", "datatable")
    ]
    logger.shutdown()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    one, other = (events.Scalars(tag) for tag in sorted(events.Tags()["scalars"]))
    assert [(event.step, event.value) for event in (*one, *other)] == [(2048, 0.25), (2048, 0.5)]
    histogram = events.Histograms("interp/activation")[0]
    assert sum(histogram.histogram_value.bucket) == histogram.histogram_value.num == 3
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (0.0, 1.0)
    image = events.Images("interp/overlay")[0]
    assert (image.step, image.height, image.width) == (2048, 8, 6)
    assert (tmp_path / "run" / "interp" / "media" / "episode" / "000002048.gif").is_file()


def test_torchrls_csv_logger_shows_numbers_and_the_folder_the_rest(tmp_path: Path) -> None:
    logger = CSVLogger("run", log_dir=str(tmp_path))
    sinks = sinks_of(logger)
    with said() as told:
        for step in range(3):
            sinks.log({"../../up": 0.5, "a name/with all": 0.25, "x" * 400: 1.0, **some_media(tmp_path)}, step)
    assert len(told) == 5  # once for each kind
    assert any("shows no histogram: 'activation' and others like it are in" in str(one.message) for one in told)
    sinks.close()
    files = {path.name for path in (tmp_path / "run" / "scalars" / "interp").iterdir()}
    assert {"......up.csv", "a name.with all.csv"} <= files or {".....up.csv", "a name.with all.csv"} <= files
    assert (tmp_path / "run" / "scalars" / "interp" / "a name.with all.csv").read_text() == "0,0.25\n1,0.25\n2,0.25\n"
    assert set(FileSink.read(tmp_path / "run" / "interp" / "log.csv")) == {"../../up", "a name/with all", "x" * 400}


def test_what_is_no_logger_is_refused() -> None:
    with pytest.raises(InputError, match="a dict is no logger: give a TorchRL Logger, a W&B run"):
        sinks_of({})


# ------------------------------------------------------------------ failing and slow


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
    assert time.monotonic() - start < 1.0
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
    before = threading.active_count()
    sinks.log({"a": 0.0}, 0)
    assert threading.active_count() == before
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
    assert time.monotonic() - start < 1.0
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


# ------------------------------------------------------------------ the folder


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


# ------------------------------------------------------------------ values

PICTURES: dict[str, tuple[Any, tuple[int, int]]] = {
    "grey": (np.zeros((5, 7)), (5, 7)),
    "channels first": (torch.rand(3, 5, 7), (5, 7)),
    "channels last": (np.zeros((5, 7, 3), np.uint8), (5, 7)),
    "one channel": (torch.rand(1, 5, 7), (5, 7)),
    "one channel last": (torch.zeros(5, 7, 1, dtype=torch.uint8), (5, 7)),
    "a stack of frames": (torch.zeros(4, 84, 84, dtype=torch.uint8), (84, 84)),
    "planes": (torch.zeros(6, 9, 8, dtype=torch.bool), (9, 8)),
    "three columns": (torch.rand(3, 64, 3), (64, 3)),
    "one pixel": (torch.rand(1, 1), (1, 1)),
    "a line": (np.zeros((1, 500)), (1, 500)),
    "normalised": (torch.randn(3, 8, 8), (8, 8)),
    "half precision": (torch.rand(3, 8, 8, dtype=torch.bfloat16), (8, 8)),
    "NaN": (torch.full((3, 8, 8), float("nan")), (8, 8)),
    "infinite": (torch.tensor([[0.0, float("inf")], [float("-inf"), 1.0]]), (2, 2)),
    "large integers": (torch.arange(16).reshape(4, 4) * 1000, (4, 4)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_any_kind(name: str, tmp_path: Path) -> None:
    pixels, shape = PICTURES[name]
    sink = FolderSink(tmp_path)
    sink.log({"map": Image(pixels)}, 1)
    sink.close()
    with Pillow.open(tmp_path / "media" / "map" / "000000001.png") as picture:
        assert (picture.height, picture.width) == shape


def test_numbers_become_the_brightness_that_they_mean() -> None:
    stack = torch.zeros(4, 84, 84, dtype=torch.uint8)
    stack[3] = 200
    assert as_frames(stack[None]).max() == as_frames(stack[None]).min() == 200  # the newest frame of a stack
    assert as_frames(torch.tensor([[[0.0, 0.5, 1.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[0.0, 128.0, 255.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[-2.0, 0.0, 2.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[True, False]]]))[0, 0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "odd", [np.zeros(5), np.zeros((2, 3, 4, 5)), np.zeros((0, 4)), np.zeros((3, 3), complex), [[1], [1, 2]]]
)
def test_what_is_no_picture_is_refused(odd: Any) -> None:
    with pytest.raises(InputError):
        Image(odd)


@pytest.mark.parametrize(
    "values", [[1.0], [1e30] * 9, [1.0, 1.0 + 1e-16], [-1e308, 1e308], [1e-320, 2e-320], [0.0, 3e38, float("inf")]]
)
def test_histograms_of_odd_ranges(values: list[float]) -> None:
    found = Histogram.of(torch.tensor(values, dtype=torch.double))
    assert int(found.counts.sum()) == sum(map(np.isfinite, values))
    assert bool(np.isfinite(found.edges).all())
    assert bool((np.diff(found.edges) > 0).all())


def test_media_that_cannot_be() -> None:
    with pytest.raises(InputError, match="needs a finite value"):
        Histogram.of([float("nan")])
    with pytest.raises(InputError, match="a row has 1 cells, and the table 2 columns"):
        DataTable(["a", "b"], [[1]])
    with pytest.raises(InputError, match=r"no\.such\.file is there"):
        Artifact(["no.such.file"])


def test_names_stay_apart() -> None:
    tags = Tags("interp", other=r"[^-\w.]")
    names = ["a b", "a_b", "a/b", "a.b", "step", "x" * 400, "x" * 401, "é" * 200]
    assert len({tags[name] for name in names}) == len(names)
    assert tags["step"] != "interp/step"
    assert all(len(tags[name].encode()) < 200 and tags[name].count("/") == 1 for name in names)


def test_a_sink_without_a_folder_keeps_what_needs_no_file(run: Any) -> None:
    sink = WandbSink(run)
    sink.log({"map": Image(np.zeros((3, 3))), "all": Histogram.of([1.0, 2.0])}, 1)
    sink.close()
    (row,) = rows_of(run)
    assert row["interp/map/_type"] == "image-file"
