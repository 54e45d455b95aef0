"""MLflow and Trackio, where they are installed: what was logged is read back from what they have stored."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tdhook_rl.report import FileSink
from tdhook_rl.report.sinks.together import sinks_of
from tests.monitoring import said
from tests.test_sinks import some_media

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = {"methods": ["Saliency()"], "seed": 3}


def logged(logger: Any, tmp_path: Path) -> list[str]:
    """Log two steps beside a script; what was said."""
    sinks = sinks_of(logger, tmp_path / "local")
    with said() as told:
        sinks.describe(FACTS)
        sinks.log({"probe/the door?": 0.25, "odd": float("nan"), **some_media(tmp_path)}, 2048)
        logger.log_scalar("train/loss", 0.5, step=7)
        sinks.log({"probe/the door?": 0.5, **{f"many {n}": float(n) for n in range(1500)}}, 4096)
        sinks.close()
    curves = FileSink.read(tmp_path / "local" / "log.csv")
    assert curves["probe/the door?"] == [(2048, 0.25), (4096, 0.5)]
    return [str(one.message) for one in told if "shows no" in str(one.message) or "failed" in str(one.message)]


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from torchrl.record.loggers.mlflow import MLFlowLogger

    logger = MLFlowLogger("cues", f"sqlite:///{tmp_path}/runs.db", artifact_location=f"file://{tmp_path}/store")
    (words,) = logged(logger, tmp_path)
    assert "MLFlowLogger shows no histogram: 'activation' and others like it are in" in words
    client, run = mlflow.MlflowClient(), logger.experiment.info.run_id
    assert mlflow.search_runs(experiment_names=["cues"])["run_id"].tolist() == [run]  # no other thread's
    found = client.get_metric_history(run, "interp/probe.the door_")
    assert [(one.step, one.value) for one in found] == [(2048, 0.25), (4096, 0.5)]
    metrics = client.get_run(run).data.metrics
    assert metrics["train/loss"] == 0.5
    assert metrics["interp/many 1499"] == 1499.0
    assert "interp/odd" not in metrics
    store = next((tmp_path / "store").iterdir()) / "artifacts"
    local = tmp_path / "local" / "media"
    assert (store / "interp/episode/000002048.gif").read_bytes() == (local / "episode/000002048.gif").read_bytes()
    assert (store / "interp/worst/000002048.csv").read_bytes() == (local / "worst/000002048.csv").read_bytes()
    assert (store / "interp/probe/000002048/probe.json").read_text() == "{}"
    assert json.loads((store / "interp/config.json").read_text()) == FACTS
    assert [one for one in (store / "images").iterdir() if "overlay+step+2048" in one.name and one.suffix == ".png"]
    mlflow.end_run()


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from torchrl.record.loggers.trackio import TrackioLogger

    logger = TrackioLogger("cues", "project", auto_log_gpu=False)
    assert logged(logger, tmp_path) == []
    logger.experiment.finish()
    with sqlite3.connect(tmp_path / "trackio" / "project.db") as stored:
        rows = [(step, json.loads(text)) for step, text in stored.execute("select step, metrics from metrics")]
        ((config,),) = stored.execute("select config from configs").fetchall()
        assert stored.execute("select name from artifacts").fetchall() == [("interp-probe",)]
    stored.close()
    by_step = dict(rows)
    assert by_step[7] == {"train/loss": 0.5}
    assert (by_step[2048]["interp/probe.the door?"], by_step[4096]["interp/probe.the door?"]) == (0.25, 0.5)
    assert "interp/odd" not in by_step[2048]
    assert by_step[2048]["interp/activation"]["values"] == [1, 0, 0, 2]
    assert by_step[2048]["interp/worst"]["_value"][0] == {"episode": 1, "return": -0.5}
    assert json.loads(config)["interp"] == FACTS
    media = {path.suffix: path for path in (tmp_path / "trackio" / "media").rglob("*.*")}
    local = tmp_path / "local" / "media" / "episode" / "000002048.gif"
    assert media[".gif"].read_bytes() == local.read_bytes()
    assert ".png" in media
