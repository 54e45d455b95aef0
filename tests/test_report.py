"""Reports: one page of any run, whoever has written it: the answer first, beside its controls."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from tdhook_rl import Saliency
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import load_results
from tdhook_rl.report import (
    DataTable,
    FileSink,
    FolderSink,
    Image,
    Monitor,
    page_of,
    read_run,
)
from tdhook_rl.report.contents import curves, media
from tdhook_rl.statistics import iqm
from tests.reporting import checked, data_of, make_runs, written

KINDS = ("local", "wandb", "csv", "tensorboard")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure of a page is enough where it is not about figures."""
    monkeypatch.setattr(curves, "MOST", 1)


# ------------------------------------------------------------------ kinds of runs


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_gives_what_was_logged(kind: str, runs: dict[str, Path]) -> None:
    expected = FileSink.read(runs["local"] / "log.csv")
    run = read_run(runs[kind])
    names = {name: name if kind != "tensorboard" else name.replace(" ", "_") for name in expected}
    for name, curve in expected.items():
        finite = [(step, value) for step, value in curve if np.isfinite(value)]
        found = [(step, value) for step, value in run.series.get(names[name], []) if np.isfinite(value)]
        assert [step for step, _ in found] == [step for step, _ in finite], name
        assert [value for _, value in found] == pytest.approx([value for _, value in finite], rel=1e-6), name
    assert run.last_step == 4 * 16 * 20
    if kind == "csv":  # which has no place for anything else
        return
    histograms = run.histograms[f"hist.cache.{FC2}"]
    assert [one.step for one in histograms] == [320, 960]
    assert all(2048 < one.counts.sum() <= 20 * 16 * 64 for one in histograms)
    assert all(one.edges[0] < one.edges[-1] for one in histograms)
    assert len(run.pictures["bars.observation.0"]) == 2
    if kind != "tensorboard":
        assert run.config["seed"] == 3
        assert run.tables["episodes"][-1].columns[:4] == ["frames", "rank", "episode", "return"]
        assert run.ended is True


def test_what_others_log_stands_beside(runs: dict[str, Path]) -> None:
    weights, csv_run = read_run(runs["wandb"]), read_run(runs["csv"])
    assert [value for _, value in weights.series["own/loss"]] == [0.25]
    assert [weights.series[name][0][1] for name in ("train.loss", "train.deep.x")] == [0.5, 2.0]
    assert weights.config["lr"] == 0.5
    assert csv_run.series["own/loss"] == [(7, 0.25)]
    assert csv_run.config["gamma"] == "0.9"
    found, _ = media.pictures_of([csv_run], 1e6)
    animation = next(one for gallery in found.parts for one in gallery.pictures if gallery.heading == "played")
    with Pillow.open(io.BytesIO(animation.content)) as gif:
        assert (gif.n_frames, gif.size) == (5, (6, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_with_the_answer_beside_its_controls(kind: str, runs: dict[str, Path]) -> None:
    parsed = checked(page_of(runs[kind]), 2 if kind == "local" else 1)
    text, log = parsed.text, FileSink.read(runs["local"] / "log.csv")
    assert text.index("What was found") < text.index("What it achieves")
    score = log["probe.the xor.accuracy"][-1][1]
    assert f"{score:.3f}" in text[text.index("What does it know?") :][:200]
    assert re.search(r"the raw input \d?\.\d+ · shuffled labels \d?\.\d+", text)
    files = data_of(parsed)
    answers = [*csv.reader(io.StringIO(files["what-was-found.csv"]))]
    assert answers[0][:5] == ["question", "measured", "found", "found (low)", "found (high)"]
    row = next(row for row in answers if "probe of the" in row[1])
    assert float(row[2]) == pytest.approx(score, rel=1e-5)
    probes = json.loads(files[next(name for name in files if name.startswith("probes-of"))])
    trained = next(iter(probes["concepts"].values()))["trained"]
    assert trained["x"] == [320, 640, 960, 1280]
    assert trained["y"][-1] == pytest.approx(score, rel=1e-5)
    assert "make it again" in text
    assert f"tdhook-rl report {runs[kind]}" in text or kind == "csv"  # there the run is one folder deeper


def test_an_analysis_says_what_its_results_are(runs: dict[str, Path]) -> None:
    page = checked(page_of(runs["analysis"]))
    sizes = load_results(runs["analysis"])["attr", "observation"].abs().double().mean(0)
    table = [*csv.DictReader(io.StringIO(data_of(page)["features.csv"]))]
    assert int(table[0]["feature"]) == int(sizes.argmax())
    assert float(table[0]["mean |.|"]) == pytest.approx(float(sizes.max()), rel=1e-5)
    assert f"the largest of {len(sizes)} is feature {int(sizes.argmax())};" in page.text
    assert "; the 64 largest are listed" in page.text


@pytest.mark.parametrize("kind", ["csv", "wandb"])
def test_a_folder_with_one_run_in_it_is_that_run(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    found = read_run(runs[kind] if kind == "csv" else runs[kind].parent)
    assert found.path.name == ("exp" if kind == "csv" else runs[kind].name)
    inside = next(runs[kind].rglob("*.csv" if kind == "csv" else "*.wandb"))
    if kind == "wandb":
        assert read_run(inside).series.keys() == found.series.keys()


# ------------------------------------------------------------------ several runs


def test_few_runs_are_all_shown_and_many_have_an_interval(tmp_path: Path) -> None:
    ends = [0.5, 0.7, 0.75, 0.8, 0.85, 0.9]
    folders = [
        written(tmp_path / f"seed {seed}", {"success": [0.0] * 10 + [end] * 3, "loss": [end]}, seed=seed)
        for seed, end in enumerate(ends)
    ]
    three, six = checked(page_of(folders[:3])), checked(page_of(folders))
    assert "3 runs are too few for an interval over runs" in three.text
    other = written(tmp_path / "another", {"alone": [0.25, 0.5]})
    assert (
        "It was logged in 1 of 2 runs. One run: nothing says how runs differ."
        in checked(page_of([other, folders[0]])).text
    )
    assert "0.500, 0.700, 0.750" in three.text
    expected = iqm(ends)
    found = [*csv.DictReader(io.StringIO(data_of(six)["what-was-found.csv"]))]
    assert float(found[0]["found"]) == pytest.approx(expected.estimate)
    assert (float(found[0]["found (low)"]), float(found[0]["found (high)"])) == pytest.approx(
        (expected.low, expected.high)
    )
    figure = json.loads(data_of(six)["success.json"])
    assert list(figure["runs"]) == [folder.name for folder in folders]
    assert figure["interquartile mean"]["y"][-1] == pytest.approx(expected.estimate)
    table = [*csv.DictReader(io.StringIO(data_of(six)["every-run.csv"]))]
    assert [row["seed"] for row in table] == list("012345")
    differing = [*csv.DictReader(io.StringIO(data_of(six)["what-differs-between-the-runs.csv"]))]
    assert [row["seed"] for row in differing] == list("012345")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [written(tmp_path / one / "run", {"success": [0.5, 0.75]}) for one in ("a", "b")]
    table = [*csv.DictReader(io.StringIO(data_of(checked(page_of([*folders, folders[0]])))["every-run.csv"]))]
    assert [row["run"] for row in table] == ["a/run", "b/run", "a/run (2)"]


# ------------------------------------------------------------------ what is no run


def test_what_is_no_run_is_told_from_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.pt").touch()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        written(tmp_path / "two" / name, {"success": [0.5]})
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "log.csv").write_text("step,name,value\n")
    known = "a folder of tdhook_rl (with log.csv), an analysis of a replay buffer"
    for name, *words in (
        ("empty", "is empty, and no run:", known),
        ("other", "it holds weights.pt;", known),
        ("two", "it holds 2 of them: name one or several", str(tmp_path / "two" / "b")),
        ("bare", "nothing is in it yet"),
        ("absent", "there is no"),
    ):
        assert main(["report", str(tmp_path / name)]) == 1
        told = capsys.readouterr().err
        assert all(one in told for one in words), told
    with pytest.raises(InputError, match="at least one run"):
        page_of([])


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path, few_figures: None) -> None:
    page = page_of(written(tmp_path / "run", {"success": [0.5]}))
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot write"):
        page.save(tmp_path / "file" / "report.html")


# ------------------------------------------------------------------ odd values and names


def test_odd_values_and_names(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    values = {
        "<script>alert(1)</script>": [0.25, 0.5],
        "a/b/c d.e": [1.0, nan, inf, 2.0],
        "nothing": [nan, nan],
        "one point": [0.125],
        "huge": [1e300, -1e300],
        "computed.attr": [0.25, 0.5],
        "nonfinite.attr.observation": [0.125, 0.0],
        'quote"&amp;': [0.0, 1.0],
        "probe.<b>.accuracy": [0.5, 0.75],
        "probe.<b>.accuracy_low": [nan, nan],
        "probe.<b>.groups": [1.0, 1.0],
        "probe.<b>.dropped_rows": [3.0, 4.0],
    }
    folder = written(tmp_path / "run <i>", values, note="</style><script>", odd={"deep": {"er": [1, None]}})
    parsed = checked(page_of(folder))
    assert "<script>alert(1)</script>" in parsed.text
    assert "computed for 38% of the rows (at least 25% of a batch)" in parsed.text
    assert "up to 12.5% of the rows of a batch were not finite" in parsed.text
    assert "The probe of '<b>' has no interval: 1 held-out group: nothing says how much groups differ." in parsed.text
    assert "The probe of '<b>' left out 7 rows" in parsed.text
    assert "The probe of '<b>' has no control beside it." in parsed.text
    assert "'nothing' (1 of 2), 'a/b/c d.e'" in parsed.text or "'a/b/c d.e' (2 of 4)" in parsed.text
    assert all("NaN" not in text and "Infinity" not in text for text in data_of(parsed).values())


def test_thousands_of_names_are_grouped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST", 3)
    values = {f"layer{n % 40}.unit{n}": [float(n), n + 1.0] for n in range(4000)}
    page = page_of(written(tmp_path / "run", values))
    parsed = checked(page)
    assert re.search(r"3 figures are drawn; [\d,]+ more groups of numbers", parsed.text)
    assert "4,000 names. 1,000 more are in the log." in parsed.text
    assert "2,000 more rows are in the file." in parsed.text
    assert len([*csv.reader(io.StringIO(data_of(parsed)["all-numbers.csv"]))]) == 3001
    assert len(page.html()) < 4e6


def test_pictures_keep_to_their_budget(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        picture = torch.randint(0, 255, (60, 60, 3), generator=noise, dtype=torch.uint8)
        sink.log({"overlay.0": Image(picture), "overlay.1": Image(picture), "success": 0.5}, step)
    sink.close()
    run = read_run(tmp_path)
    size = run.pictures["overlay.0"][0].size
    section, _ = media.pictures_of([run], 3.5 * size)
    (gallery,) = section.parts
    assert [one.caption for one in gallery.pictures] == [
        "overlay.0, frame 8", "overlay.1, frame 8", "overlay.0, frame 1"
    ]  # fmt: skip
    assert section.text.startswith("3 of 16 that were logged")
    few = checked(page_of(run, most_bytes=0))
    assert "0 of 16 that were logged" in few.text
    assert not any(tag == "img" for tag, _ in few.tags)


def test_tables_of_results_are_figures_too(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path)
    doses = DataTable(
        [
            "vector",
            "outcome",
            "alpha",
            "baseline",
            "mean",
            "mean_low",
            "mean_high",
            "random",
            "random_low",
            "random_high",
        ],
        [["up", "other corner", at, 0.05, at, at - 0.1, at + 0.1, 0.05, -0.05, 0.15] for at in (0.2, 0.5, 0.8)],
    )
    probes = DataTable(
        ["site", "concept", "trained", "untrained", "chance"],
        [[site, concept, 0.9, 0.6, 0.5] for site in ("fc1", "fc2") for concept in ("door", "key")],
    )
    curve = {"probe.door.fc2.accuracy": 0.9, "probe.door.fc2.accuracy.untrained": 0.6}
    sink.log({"steering": doses, "probes": probes, **curve}, 100)
    sink.close()
    parsed = checked(page_of(tmp_path))
    files = data_of(parsed)
    drawn = json.loads(files["steering-other-corner.json"])["curves"]
    assert drawn["up"]["y"] == [0.05, 0.2, 0.5, 0.8]
    assert drawn["random directions"]["high"] == [0.05, 0.2, 0.2, 0.2]
    grid = next(json.loads(text) for name, text in files.items() if name.startswith("which-concepts"))
    assert "door" in json.dumps(grid)
    row = next(csv.DictReader(io.StringIO(files["steering.csv"])))
    assert [row[name] for name in ("mean", "mean (low)", "mean (high)")] == ["0.2", "0.1", "0.30000000000000004"]
    assert "untrained network 0.600 · chance 0.500" in parsed.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_was_stopped_says_so(error: type[BaseException], tmp_path: Path) -> None:
    """Its monitor was closed in order, and has a summary as if all had been done."""

    def run(policy: Any) -> None:
        with Monitor(policy, tmp_path / "run") as monitor:
            monitor.step(CueCorners(batch_size=[4]).rollout(5, policy, break_when_any_done=False))
            raise error

    with Saliency().prepare(make_actor()) as policy, pytest.raises(error):
        run(policy)
    assert f"stopped by {error.__name__} at frame 20" in page_of(read_run(tmp_path / "run")).html()
