"""The demo and the command line: what is written, what is refused, and being stopped."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tdhook_rl import LinearProbe
from tdhook_rl.cli import main
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.demo import Settings
from tdhook_rl.report import FileSink, LoggerSink, Sinks, new_folder, open_wandb
from tdhook_rl.sweeps import SteeringVector
from tests.wandb_reader import history, records


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--frames", "24576", "--seed", "0", "--out", str(folder)]) == 0
    return folder


def test_the_demo_finds_what_the_environment_holds(finished: Path) -> None:
    curves = FileSink.read(finished / "log.csv")
    last = {name: values[-1][1] for name, values in curves.items()}
    assert last["final.success"] >= 0.9
    assert last["final.saliency_ratio"] >= 4
    assert last["final.probe.xor"] >= 0.95
    assert last["final.probe.unneeded_xor"] <= 0.75  # a third of the demo's frames; there it is 0.70
    assert last["final.steer.other.1.0"] >= 0.93
    assert last["final.steer.other.0.0"] <= 0.1
    assert last["readout.xor"] >= 0.95
    assert [step for step, _ in curves["success"]] == list(range(2048, 24577, 2048))


def test_the_demo_writes_one_folder(finished: Path) -> None:
    report = (finished / "report.html").read_text()
    assert {path.name for path in (finished / "figures").glob("*.svg")} == {
        "1_learning.svg",
        "2_lights.svg",
        "3_maps.svg",
        "4_steering.svg",
        "5_episode.svg",
    }
    for saved in (finished / "figures").glob("*.json"):
        assert f'<svg role="img" aria-label="{html.escape(json.loads(saved.read_text())["alt"])}"' in report
    assert (finished / "overview.png").stat().st_size > 30_000
    assert LinearProbe.load(finished / "probe_xor").facts["accuracy"] >= 0.95
    assert SteeringVector.load(finished / "vector_corner_a").vector.shape == (64,)


def test_what_is_said_of_the_untrained_network_was_measured_once(finished: Path) -> None:
    """The table and the curve beside it are the same measurement, in the same states."""
    found = {one["measured"]: one for one in json.loads((finished / "findings.json").read_text())}
    concepts = json.loads((finished / "figures" / "1_learning.json").read_text())["data"]["concepts"]
    for words, name in (("needed XOR", "xor (needed)"), ("XOR that is not", "other xor (not needed)")):
        (of_table,) = (one for measured, one in found.items() if words in measured and "probe" in measured)
        curves = concepts[name]
        assert curves["trained"]["y"][-1] == of_table["value"]["estimate"]
        assert curves["trained"]["y"][0] == of_table["beside"]["untrained"]["estimate"]
        assert set(curves["untrained"]["y"]) == {of_table["beside"]["untrained"]["estimate"]}
        assert curves["untrained"]["low"][0] == of_table["beside"]["untrained"]["low"]


def test_the_player_has_eight_episodes_steered_and_not(finished: Path) -> None:
    (one,) = (finished / "players").glob("*.json")
    head = json.loads(one.read_text())["head"]
    assert len(head["episodes"]) == 8
    shown = json.dumps(head)
    assert "not steered" in shown
    assert "steered" in shown
    assert "data-player" in (finished / "report.html").read_text()


def test_the_wandb_run_holds_pictures_tables_and_artifacts(finished: Path) -> None:
    (file,) = (finished / "wandb").glob("offline-run-*/*.wandb")
    kinds = {name: value for row in history(file) for name, value in row.items() if name.endswith("/_type")}
    assert {"histogram", "image-file", "table-file"} <= set(kinds.values()), kinds
    assert any("steering" in name for name in kinds)
    logged = {record.artifact.name for record in records(file) if record.WhichOneof("record_type") == "artifact"}
    assert any("vector.corner_a" in name for name in logged), logged
    assert any("probe.xor_on_policy" in name for name in logged), logged


def test_the_wandb_run_holds_the_same_curves(finished: Path) -> None:
    (file,) = (finished / "wandb").glob("offline-run-*/*.wandb")
    rows = [row for row in history(file) if "interp/success" in row]
    assert rows
    expected = FileSink.read(finished / "log.csv")["success"]
    assert [(row["interp/step"], row["interp/success"]) for row in rows] == expected
    assert "WANDB_MODE" not in os.environ


def test_help_shows_the_knobs(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert all(knob in shown for knob in ("--frames", "--seed", "--workers", "--out", "--logger"))


def test_bad_knobs_and_folders_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.csv").touch()
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "full")], "holds the output of another run"),
        (["--out", str(tmp_path / "file")], "is a file"),
        (["--out", str(tmp_path / "file" / "below")], "cannot write into"),
        (["--frames", "5"], "at least one batch of 2048"),
        (["--workers", "3"], "divides the 128 environments"),
    ):
        assert main(["demo", *arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(InputError):
        Settings(workers=-1)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    # Root may write anywhere, so the refusal of the system is raised here.
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ArtifactError, match=r"cannot write into .*Permission denied"):
        new_folder(tmp_path / "new")


def test_wandb_that_cannot_start_is_said_once(tmp_path: Path, monkeypatch) -> None:
    import wandb

    def fail(*args, **kwargs):
        raise wandb.errors.CommError("no server")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match=r"W&B could not start .*local files only") as warned:
        sink = open_wandb(tmp_path, "run", {})
    assert len(warned) == 1
    sinks = Sinks(FileSink(tmp_path / "log.csv"), sink)
    sinks.log({"a": 1.0}, 1)
    sinks.log({"a": 2.0}, 2)
    sinks.close()
    assert FileSink.read(tmp_path / "log.csv") == {"a": [(1, 1.0), (2, 2.0)]}


def test_a_logger_that_breaks_is_said_once_and_the_file_goes_on(tmp_path: Path) -> None:
    class Breaking:
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("gone")

    sinks = Sinks(LoggerSink(Breaking()), FileSink(tmp_path / "log.csv"))
    with pytest.warns(UserWarning, match="Breaking failed .ConnectionError: gone"):
        sinks.log({"a": 0.0}, 0)
    sinks.log({"a": 1.0}, 1)  # a second warning would be an error here
    sinks.log({"a": 2.0}, 2)
    sinks.close()
    assert len(FileSink.read(tmp_path / "log.csv")["a"]) == 3
    with pytest.raises(ArtifactError, match="exists already"):
        FileSink(tmp_path / "log.csv")


def begun(log: Path) -> bool:
    """Whether a batch and more has been logged."""
    return log.exists() and len(log.read_text().splitlines()) > 20


def test_ctrl_c_leaves_a_readable_log(tmp_path: Path, capsys) -> None:
    log = tmp_path / "run" / "log.csv"
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.05):
            if begun(log):
                os.kill(os.getpid(), signal.SIGINT)
                return

    watching = threading.Thread(target=interrupt)
    watching.start()
    try:
        frames = str(50 * 2048)  # which would take a minute
        code = main(["demo", "--frames", frames, "--out", str(tmp_path / "run"), "--logger", "csv"])
    finally:
        over.set()
        watching.join()
    assert code == 130
    assert "stopped; what was measured so far" in " ".join("".join(capsys.readouterr()).split())
    assert all(torch.isfinite(torch.tensor(value)) for _, value in FileSink.read(log)["reward"])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_readable_log_and_no_workers(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tdhook_rl.cli", "demo", "--frames", "100000000"]
    command += ["--out", str(folder), "--workers", str(workers), "--logger", "csv"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        log = folder / "log.csv"
        while not begun(log):
            assert time.monotonic() < deadline, "the demo did not start logging"
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the workers are told as well
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output.decode()
    assert "stopped; what was measured so far" in output.decode()
    assert all(torch.isfinite(torch.tensor(value)) for _, value in FileSink.read(log)["reward"])
    deadline = time.monotonic() + 30  # ended workers wait to be reaped by init
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker process is left"
        time.sleep(0.2)
