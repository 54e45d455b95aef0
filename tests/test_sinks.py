"""Sinks: what was logged is in the folder and in each backend, record by record."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.wandb import WandbLogger

from tdhook_rl.errors import InputError
from tdhook_rl.report import (
    Animation,
    Artifact,
    DataTable,
    FileSink,
    Histogram,
    Image,
    WandbSink,
)
from tdhook_rl.report.sinks.together import sinks_of
from tests.monitoring import QUIET, said
from tests.wandb_reader import finished, records


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    found = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    yield found
    found.finish()


def rows_of(run: Any) -> list[dict[str, Any]]:
    """The rows of a run that is finished, without W&B's own entries."""
    rows = [{name: value for name, value in row.items() if name[0] != "_"} for row in finished(run)]
    return [row for row in rows if row]


def some_media(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "probe.json").write_text("{}")
    return {
        "activation": Histogram.of([0.0, 1.0, 1.0, float("nan")], bins=4),
        "overlay": Image(torch.rand(3, 8, 6), caption="step 1"),
        "episode": Animation(torch.randint(0, 255, (5, 9, 7, 3), dtype=torch.uint8)),
        "worst": DataTable(["episode", "return"], [[1, -0.5], ["two", float("nan")]]),
        "probe": Artifact([tmp_path / "probe.json"], "probe", {"accuracy": 0.9}, ["best"]),
    }


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
@pytest.mark.parametrize("own_step", [True, False], ids=["its own step", "no step"])
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_a_script_loses_nothing(order: str, own_step: bool, count: int, run: Any, tmp_path: Path) -> None:
    """W&B drops a row whose step is behind the run's, in silence: of a script that logs before us, and after."""
    with said() as told:
        sinks = [sinks_of(run, tmp_path / str(number)) for number in range(count)]
    assert len(told) == count - 1
    assert not told or "this one does as interp2/..." in str(told[0].message)
    for update in range(5):
        options = {"step": update} if own_step else {}
        if order != "after":
            run.log({"reward": float(update)}, **options)
        for number, one in enumerate(sinks):
            one.log({"mass": update + 0.25 + number}, 100 * update)
        if order != "before":
            run.log({"loss": float(update)}, **options)
    for one in sinks:
        one.close()
    rows = rows_of(run)
    for name in {"before": ["reward"], "after": ["loss"], "both": ["reward", "loss"]}[order]:
        assert [row[name] for row in rows if name in row] == [0.0, 1.0, 2.0, 3.0, 4.0]
    for number in range(count):
        prefix = "interp" if not number else "interp2"
        found = [(row[f"{prefix}/step"], row[f"{prefix}/mass"]) for row in rows if f"{prefix}/mass" in row]
        assert found == [(100 * update, update + 0.25 + number) for update in range(5)]


def test_the_next_sink_of_a_run_writes_over_nothing(run: Any, tmp_path: Path) -> None:
    for number in range(3):
        one = sinks_of(run, tmp_path / str(number))
        one.log({"mass": float(number)}, number)
        one.close()
    assert [row["interp/mass"] for row in rows_of(run)] == [0.0, 1.0, 2.0]


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
        f"TensorboardLogger shows no {kind}" for kind in ("animation", "artifact", "table")
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


def test_a_sink_without_a_folder_keeps_what_needs_no_file(run: Any) -> None:
    sink = WandbSink(run)
    sink.log({"map": Image(np.zeros((3, 3))), "all": Histogram.of([1.0, 2.0])}, 1)
    sink.close()
    (row,) = rows_of(run)
    assert row["interp/map/_type"] == "image-file"
