"""Reports of runs that were killed, cut or damaged, and of folders that say what nobody expects."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import TdhookError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze
from tdhook_rl.report import (
    Budgets,
    DataTable,
    FolderSink,
    Monitor,
    page_of,
    read_run,
)
from tdhook_rl.report.contents import curves
from tdhook_rl.report.contents.cautions import cautions_of
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tests.reporting import checked, everything, make_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure of a page is enough where it is not about figures."""
    monkeypatch.setattr(curves, "MOST", 1)


@pytest.mark.usefixtures("few_figures")
def test_a_run_that_was_killed_has_a_report(tmp_path: Path) -> None:
    script = """
        import sys, warnings
        warnings.simplefilter("ignore")
        from tdhook_rl import Saliency
        from tdhook_rl.envs import CueCorners
        from tdhook_rl.examples.agent import make_actor
        from tdhook_rl.report import Monitor
        with Saliency().prepare(make_actor()) as policy:
            monitor = Monitor(policy, sys.argv[1], media_every=3)
            while True:
                monitor.step(CueCorners(batch_size=[4]).rollout(10, policy, break_when_any_done=False))
    """
    folder = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(folder)])
    try:
        deadline = time.monotonic() + 90
        while not (folder / "log.csv").exists() or len((folder / "log.csv").read_bytes()) < 3000:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    parsed = checked(page_of(folder))
    last = max(step for curve in read_run(folder).series.values() for step, _ in curve)
    assert f"The run did not come to its end, or goes on: the last frame that is there is {last:,}." in parsed.text
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


#: What a document, or a log, may hold that nobody expects.
ODD: tuple[Any, ...] = (
    None, True, -1, 1e308, float("nan"), "", "<b>", [], {}, [[1]], 10**400, "\ud800", {"_type": "histogram"}, "x" * 200
)  # fmt: skip
ODD_NAMES = (
    "probe.x.accuracy", "probe.x.accuracy_low", "probe.x.groups", "probe..accuracy", "probe.accuracy", "attr.o",
    "attr.", "attr.o.f", "mass.o.g", "mass.", "dormant", "dormant/", "dormant.a", "cache.s", "cache.s.std", ".",
    "/", "a/", "computed.", "nonfinite.x", "success", "control.", "x" * 300, "\u202e", "churn", "probe.x.r2",
)  # fmt: skip


@pytest.mark.usefixtures("few_figures")
def test_whatever_a_folder_says_gives_a_page(tmp_path: Path) -> None:
    whole, draw = everything(tmp_path / "whole"), random.Random(0)

    def odd(value: Any) -> Any:
        if draw.random() < 0.15:
            return draw.choice(ODD)
        if isinstance(value, dict):
            return {name: odd(one) for name, one in value.items() if draw.random() < 0.9}
        return [odd(one) for one in value] if isinstance(value, list) else value

    for number in range(25):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        for path in [*folder.rglob("*.json"), folder / "histograms.jsonl"]:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            documents = [json.loads(line) for line in lines]
            path.write_text("\n".join(json.dumps(odd(one)) for one in documents), errors="replace")
        rows = [
            f"{draw.choice([-5, 0, 1, 2, 100, 10**18, 10**29])},{draw.choice(ODD_NAMES)},"
            f"{draw.choice(['0.5', 'nan', 'inf', '1e308', '-1e308', '0.0', '5e-324', '2.0'])}\n"
            for _ in range(draw.randrange(60))
        ]
        (folder / "log.csv").write_text("step,name,value\n" + "".join(rows), encoding="utf-8")
        checked(page_of([folder] * draw.choice([1, 1, 2, 5])))


def test_whatever_is_cut_or_damaged_gives_a_page_or_a_named_error(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MOST", 0)
    whole = {"ours": everything(tmp_path / "whole"), "wandb": tmp_path / "wandb", **{
        name: runs[name] for name in ("csv", "tensorboard", "analysis")}}  # fmt: skip
    shutil.copytree(runs["wandb"], whole["wandb"], ignore=shutil.ignore_patterns("interp"))
    draw = random.Random(0)
    outcomes: Counter[str] = Counter()
    for number in range(40):
        kind = draw.choice(["ours", "ours", "ours", *whole])
        folder = tmp_path / f"{kind}-{number}"
        shutil.copytree(whole[kind], folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        for path in [draw.choice(files), next(folder.glob("*.wandb"), draw.choice(files))]:
            _damage(path, draw)
        try:
            text = checked(page_of(folder)).text
        except TdhookError as error:
            outcomes["named error" if str(folder) in str(error) else str(error)] += 1
        else:
            assert len(text) > 100
            outcomes["page"] += 1
        shutil.rmtree(folder)
    assert outcomes.keys() <= {"page", "named error"}
    assert outcomes["page"] > 25


def _damage(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if draw.random() < 0.6 or not content:
        content = content[: draw.randrange(len(content) + 1)]
    else:
        for _ in range(draw.randrange(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def test_what_is_cut_is_said(tmp_path: Path, few_figures: None) -> None:
    folder = everything(tmp_path / "run")
    for name in ("log.csv", "histograms.jsonl", "findings.json", "config.json"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-4])
    png = folder / "media" / "overlay" / "000000300.png"
    png.write_bytes(png.read_bytes()[:60])
    (folder / "summary.json").unlink()
    text = checked(page_of(folder)).text
    for words in (
        "line 4 was cut and left out",
        "1 of the lines of histograms.jsonl were cut",
        "findings.json holds no findings that can be read",
        "config.json cannot be read and is left out: it was cut",
        "Pictures that were cut or damaged are left out: overlay at 300",
    ):
        assert words in text, words


def test_what_a_monitor_could_not_log_is_in_its_report(tmp_path: Path) -> None:
    def breaks(batch: Any) -> Any:
        if broken:
            raise RuntimeError("no such concept")
        return batch["concept", "xor"]

    broken: list[bool] = []
    probe = OnlineProbe(features=("cache", FC2), label=breaks, split=GroupSplit("episode", held_out=0.3))
    with warnings.catch_warnings(), Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor()) as policy:
        warnings.simplefilter("ignore")
        budgets = Budgets(keys=2, bytes=1000)
        logger = CSVLogger("exp", log_dir=str(tmp_path / "csv"))
        monitor = Monitor(policy, logger, folder=tmp_path / "run", probes={"x": probe}, budgets=budgets)
        for _ in range(2):
            data = CueCorners(batch_size=[8]).rollout(10, policy, break_when_any_done=False)
            data["episode"] = torch.arange(8)[:, None].expand(8, 10)
            monitor.step(data)
            broken.append(True)
        monitor.close()
    del logger
    lines = "\n".join(cautions_of(read_run(tmp_path / "run")))
    assert "there are more than 2 names to log (budget)" in lines
    assert "holds the 1e+03 bytes of media that are allowed (budget): 'bars.observation.0'" in lines
    assert "Monitor could not log the probe 'x' (RuntimeError: no such concept), from frame 160 on." in lines


def test_two_monitors_of_one_logger_are_both_in_the_report(tmp_path: Path) -> None:
    logger = CSVLogger("exp", log_dir=str(tmp_path))
    with Saliency().prepare(make_actor()) as policy, Saliency().prepare(make_actor()) as other:
        data = CueCorners(batch_size=[4]).rollout(5, policy, break_when_any_done=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Monitor(policy, logger) as one, Monitor(other, logger) as two:
                one.step(data)
                two.step(data.exclude("attr", "computed", "logits"))
                two.log({"mine": 1.0})
        drawn = Drawing(figure=Figure(), title="Beside", alt="nothing")
        drawn.save(two.folder / "figures" / "beside.svg")
    run = read_run(tmp_path)
    name = "attr.observation"
    assert (run.series[name], run.series[f"interp2/{name}"]) == ([(20, one.stats()[name])], [(20, two.stats()[name])])
    assert one.stats()[name] != two.stats()[name]
    assert run.series["mine"] == [(20, 1.0)]
    assert [figure.title for figure in run.figures] == ["Beside"]
    assert [line for line in run.warnings if "are shown as interp2/..." in line]


def test_names_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    cells = ["1_2", "--5", "²", "-", "1-2", -3, 0.5, 1e-300, None]
    (tmp_path / "log.csv").write_text("step,name,value\n")
    folder = tmp_path / "media" / "cells"
    folder.mkdir(parents=True)
    for name in ("7", "--5", "²", "1_2", "-"):
        (folder / f"{name}.csv").write_bytes(DataTable(["cell"], [[cell] for cell in cells]).content())
    (found,) = read_run(tmp_path).tables["cells"]  # the others are of no step
    assert (found.step, [row[0] for row in found.rows if row]) == (7, cells[: len(found.rows)])


def test_rows_of_an_analysis_are_those_that_are_looked_at(tmp_path: Path) -> None:
    actor = make_actor()
    rows = CueCorners(batch_size=[4]).rollout(5, actor, break_when_any_done=False).detach()
    rows["observation"][0] = float("nan")
    with Saliency(target=targets.chosen_logit()).prepare(actor) as policy:
        analyze(policy, rows, tmp_path, on_mismatch="ignore")  # entries of 5 rows, one of them without attributions
    (found,) = read_run(tmp_path).findings
    assert "half of 15 rows lie" in found.words


@pytest.mark.usefixtures("few_figures")
def test_limits_the_wrong_way_round_are_said(tmp_path: Path) -> None:
    values = {"accuracy": [0.5, 0.6], "accuracy_low": [0.4, 0.7], "accuracy_high": [0.6, 0.5], "groups": [9.0, 9.0]}
    row = {"site": "0", "concept": "door", "trained": 0.6, "trained_low": 0.7, "trained_high": 0.5}
    sink = FolderSink(tmp_path / "run")
    for step in range(2):
        sink.log({f"probe.door.{name}": curve[step] for name, curve in values.items()}, step + 1)
    sink.log({"probes": DataTable(list(row), [list(row.values())])}, 2)
    sink.close()
    parsed = checked(page_of(tmp_path / "run"))
    assert "the limits that were logged are the wrong way round" in parsed.text
