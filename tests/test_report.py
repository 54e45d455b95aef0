"""Reports: one page of any run, however it ended; the answer first, its data inside, for every reader."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import random
import re
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
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import wandb
from PIL import Image as Pillow
from torch.utils.tensorboard import SummaryWriter
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError, TdhookError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, load_results
from tdhook_rl.report import (
    Animation,
    Artifact,
    Budgets,
    Cautions,
    DataTable,
    Facts,
    FileSink,
    Finding,
    Findings,
    FolderSink,
    Fragment,
    Histogram,
    Image,
    Monitor,
    Page,
    Section,
    Table,
    page_of,
    player,
    read_run,
    save_findings,
)
from tdhook_rl.report.contents import curves, media
from tdhook_rl.report.contents.cautions import cautions_of
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.page.findings_file import load_findings
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tdhook_rl.statistics import Interval, grouped_mean, iqm
from tests.browser import needs_chromium, shared
from tests.wandb_reader import finished

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
KINDS = ("local", "wandb", "csv", "tensorboard")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, logged by a monitor into everything that a report is made of; and an analysis."""
    base = tmp_path_factory.mktemp("runs")
    run = wandb.init(mode="offline", dir=str(base), project="p", settings=QUIET, config={"lr": 0.5})
    writer, logger = SummaryWriter(str(base / "tensorboard")), CSVLogger("exp", log_dir=str(base / "csv"))
    torch.manual_seed(0)
    actor = make_actor()
    split = GroupSplit("episode", held_out=0.3)
    probe = OnlineProbe(features=("cache", FC2), label=("concept", "xor"), split=split, decay=0.5)
    lights = CueCorners.light_features().tolist()
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    with warnings.catch_warnings(), method.prepare(actor) as policy:
        warnings.simplefilter("ignore")
        monitor = Monitor(
            policy, [run, writer, logger], folder=base / "local", media_every=2, table_every=2, seed=3,
            groups={"needed": lights[:2], "unneeded": lights[2:]}, probes={"the xor": probe},
        )  # fmt: skip
        for seed in range(4):
            data = CueCorners(batch_size=[16], seed=seed).rollout(20, policy, break_when_any_done=False)
            data["episode"] = torch.arange(16)[:, None].expand(16, 20) + 16 * seed
            monitor.step(data)
        monitor.close()
        buffer = ReplayBuffer(storage=LazyTensorStorage(100))
        data = CueCorners(batch_size=[5]).rollout(20, actor, break_when_any_done=False)
        buffer.extend(data.reshape(-1).detach())
        analyze(policy, buffer, base / "analysis")
        player(data[:2], policy=policy, title="played <b>").record(base / "local")
    run.log({"own/loss": 0.25})
    finished(run)
    writer.close()
    logger.log_hparams({"gamma": 0.9})
    logger.log_scalar("own/loss", 0.25, 7)
    logger.log_video("played", torch.randint(0, 255, (1, 5, 3, 8, 6), dtype=torch.uint8), 7)
    del logger
    wandb_folder = Path(run.settings.sync_dir)
    return {
        "local": base / "local", "wandb": wandb_folder, "csv": base / "csv", "tensorboard": base / "tensorboard",
        "analysis": base / "analysis",
    }  # fmt: skip


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure of a page is enough where it is not about figures."""
    monkeypatch.setattr(curves, "MOST", 1)


class Parsed(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in given}
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def checked(page: Page, programs: int = 1) -> Parsed:
    """A page that keeps what every page promises.

    Args:
        page: to be written.
        programs: the page's own, and that of the players.
    """
    text = page.html()
    parsed = Parsed(text)
    twice = [name for name, count in Counter(parsed.ids).items() if count > 1]
    assert not twice, f"ids that are there twice: {twice[:3]}"
    assert all(later - earlier <= 1 for earlier, later in zip(parsed.headings, parsed.headings[1:], strict=False))
    assert parsed.headings[:1] == [1]
    for tag, given in parsed.tags:
        if tag == "img":
            assert given.get("alt"), "a picture without words"
        if tag == "svg" and "aria-hidden" not in given:
            assert given.get("aria-label"), "a figure without words"
        links = [given[name] for name in ("href", "src", "xlink:href") if name in given]
        assert all(link.startswith(("#", "data:")) for link in links), links
        for link in links:
            assert not link.startswith("#") or link[1:] in parsed.ids, f"{link} leads nowhere"
    assert "url(http" not in text
    scripts = [given for tag, given in parsed.tags if tag == "script" and given.get("type") != "application/json"]
    assert len(scripts) == programs, "a script that is not the page's"
    return parsed


def data_of(parsed: Parsed) -> dict[str, str]:
    """The files within a page."""
    links = [given for tag, given in parsed.tags if tag == "a" and "download" in given]
    return {one["download"]: unquote(one["href"].split(",", 1)[1]) for one in links}


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
    assert f"the largest of 64 is feature {int(sizes.argmax())}" in page.text


@pytest.mark.parametrize("kind", ["csv", "wandb"])
def test_a_folder_with_one_run_in_it_is_that_run(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    found = read_run(runs[kind] if kind == "csv" else runs[kind].parent)
    assert found.path.name == ("exp" if kind == "csv" else runs[kind].name)
    inside = next(runs[kind].rglob("*.csv" if kind == "csv" else "*.wandb"))
    if kind == "wandb":
        assert read_run(inside).series.keys() == found.series.keys()


# ------------------------------------------------------------------ several runs


def written(folder: Path, values: dict[str, list[float]], **config: Any) -> Path:
    sink = FolderSink(folder)
    sink.describe(config)
    for step in range(max(map(len, values.values()), default=0)):
        sink.log({name: curve[step] for name, curve in values.items() if step < len(curve)}, 100 * step)
    sink.summarise({})
    sink.close()
    return folder


def test_few_runs_are_all_shown_and_many_have_an_interval(tmp_path: Path) -> None:
    ends = [0.5, 0.7, 0.75, 0.8, 0.85, 0.9]
    folders = [
        written(tmp_path / f"seed {seed}", {"success": [0.0] * 10 + [end] * 3, "loss": [end]}, seed=seed)
        for seed, end in enumerate(ends)
    ]
    three, six = checked(page_of(folders[:3])), checked(page_of(folders))
    assert "3 runs are too few for an interval over runs" in three.text
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


# ------------------------------------------------------------------ runs that crashed


def test_a_run_that_was_killed_has_a_report(tmp_path: Path) -> None:
    script = """
        import sys, warnings
        warnings.simplefilter("ignore")
        from tdhook_rl import Saliency
        from tdhook_rl.envs import CueCorners
        from tdhook_rl.examples.agent import make_actor
        from tdhook_rl.report import Monitor
        with Saliency().prepare(make_actor()) as policy:
            monitor = Monitor(policy, sys.argv[1], media_every=1)
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


def everything(folder: Path) -> Path:
    """A small run with one of everything."""
    sink = FolderSink(folder)
    sink.describe({"seed": 1, "methods": ["Saliency()"]})
    (folder / "probe.json").write_text("{}")
    for step in (100, 200, 300):
        pictures = torch.randint(0, 255, (4, 12, 10, 3), dtype=torch.uint8)
        sink.log(
            {
                "success": step / 400, "hist.cache.fc": Histogram.of([0.0, 1.0, step], bins=4),
                "overlay": Image(pictures[0]), "episode": Animation(pictures),
                "episodes": DataTable(["episode", "return"], [[1, 0.5], ["two", None]]),
                "probe": Artifact([folder / "probe.json"], "probe", {"accuracy": 0.75}),
            },
            step,
        )  # fmt: skip
    save_findings(folder, [Finding(question="Is it?", measured="share", value=0.5, beside={"chance": 0.25})])
    Drawing(figure=_figure(), title="A line", alt="It rises.", data={"y": [0, 1]}).save(folder / "figures" / "line.png")
    sink.summarise({"success": 0.75})
    sink.close()
    return folder


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1])
    return figure


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
        ["outcome", "alpha", "rate", "rate_low", "rate_high", "random", "random_low", "random_high", "controls"],
        [["other corner", alpha, alpha, alpha - 0.1, alpha + 0.1, 0.1, 0.0, 0.2, 8] for alpha in (0.2, 0.5, 0.8)],
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
    assert drawn["steered"]["y"] == [0.2, 0.5, 0.8]
    assert drawn["random directions"]["high"] == [0.2] * 3
    grid = next(json.loads(text) for name, text in files.items() if name.startswith("which-concepts"))
    assert "door" in json.dumps(grid)
    row = next(csv.DictReader(io.StringIO(files["steering.csv"])))
    assert [row[name] for name in ("rate", "rate (low)", "rate (high)")] == ["0.2", "0.1", "0.30000000000000004"]
    assert "untrained network 0.600 · chance 0.500" in parsed.text


# ------------------------------------------------------------------ pages


def interval(estimate: float = 0.5, low: float = 0.25, high: float = 0.75) -> Interval:
    return Interval(estimate=estimate, low=low, high=high, confidence=0.95, method="t", groups=9, rows=90)


def test_findings_come_back_as_they_were(tmp_path: Path) -> None:
    found = [
        Finding(
            question="What?", measured="share", value=interval(), beside={"chance": 0.25, "shuffled": interval()},
            words="so", met=True,
        ),
        Finding(question="How?", measured="in words", value="by looking"),
        Finding(question="Why?", measured="unknown", value=grouped_mean([1.0])),
    ]  # fmt: skip
    back = load_findings(save_findings(tmp_path, found))
    assert back[:2] == found[:2]
    assert (back[2].value.words, back[2].value.known) == (found[2].value.words, False)
    for odd in ("[]x", '[{"question": 1}]', "{}", '[{"question": "a", "measured": "b", "value": {"low": 1}}]'):
        (tmp_path / "odd.json").write_text(odd)
        with pytest.raises(ArtifactError, match="holds no findings"):
            load_findings(tmp_path / "odd.json")


def test_a_page_that_is_kept_is_made_again(tmp_path: Path) -> None:
    found = [Finding(question="What?", measured="share", value=interval(), beside={"chance": 0.25})]
    drawings = [Drawing(figure=_figure(), title=f"Line {n}", alt="It rises.", data={"y": [0, n]}) for n in range(3)]
    page = Page(title="t", parts=[Findings(found), drawings[0], Section("more", [drawings[1:]])])
    assert page.keep(tmp_path / "run") == tmp_path / "run" / "report.html"
    again = page_of(tmp_path / "run")
    parsed = checked(again)
    assert [one.get("alt") for tag, one in parsed.tags if tag == "img"] == ["It rises."] * 3
    assert json.loads(data_of(parsed)["line-2.json"]) == {"y": [0, 2]}
    assert next(part for part in again.parts if isinstance(part, Findings)).found == found


def test_what_is_no_part_of_a_page_is_refused() -> None:
    with pytest.raises(InputError, match="a page consists of Cautions, DataTable, Drawing"):
        Page(title="t", parts=[3]).html()
    with pytest.raises(InputError, match="a row has 1 cells, and the table 2 columns"):
        Table("t", ["a", "b"], [["1"]])


def test_drawings_of_one_title_do_not_share_ids() -> None:
    drawings = [Drawing(figure=_figure(), title="same", alt="a line", data={"y": [0, 1]}) for _ in range(3)]
    page = Page(title="t", parts=[*drawings, Section("same", [drawings[:2]]), Table("same", ["a"], [[1]])])
    parsed = checked(page)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 5
    assert "iframe" in page._repr_html_()


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def shown(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything that a page can hold."""
    page = page_of(runs["local"])
    rows = [[f"row {n % 7}", 0.1 * n, "yes" if n % 2 else "no", interval(), None if n == 3 else n] for n in range(40)]
    parts = [
        *page.parts, Table("A wide table", ["name", "number", "met", "interval", "gaps " + "and words " * 6], rows),
        Cautions(["x" * 300], "More to be careful of"), Facts("Facts", {"a" * 200: "b" * 400}),
        Findings([Finding(question="Is it?", measured="share", value=interval(), met=one) for one in (True, False)]),
        Fragment("Others", "<p>as it is</p>"),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    return Page(title=page.title, lead=page.lead, parts=parts, command="tdhook-rl report " + "x" * 200).save(path)


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1100, True), (390, False), (390, True)])
def test_a_page_fits_and_can_be_read(width: int, dark: bool, shown: Path) -> None:
    with shared().page(shown, width=width, dark=dark) as page:
        assert page.console == []
        assert all(address.startswith(("file:", "data:")) for address in page.requests)
        assert page.run("document.documentElement.scrollWidth") <= width
        cut = page.run(
            """[...document.querySelectorAll('body *')].filter(one => {
              const box = one.getBoundingClientRect();
              const inner = one.closest('.box, .drawing, pre, .skip, svg') || one.closest('nav');
              return !inner && box.width && box.right > document.documentElement.clientWidth + 1;
            }).map(one => one.outerHTML.slice(0, 80))"""
        )
        assert cut == []
        assert page.run(CONTRAST) == []


#: The texts whose colour is too near to what is behind them.
CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(one => one / 255)
    .map(one => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [.2126, .7152, .0722][at], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')].filter(one =>
    [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) && one.checkVisibility()
    && !['SCRIPT', 'STYLE', 'title'].includes(one.tagName)
  ).map(one => {
    const look = getComputedStyle(one);
    const ink = parse(one.closest('svg') && look.fill !== 'none' ? look.fill : look.color);
    const [high, low] = [light(ink), light(behind(one.closest('svg') ? one.closest('svg').parentElement : one))]
      .sort((a, b) => b - a);
    return [(high + .05) / (low + .05), one.tagName, one.textContent.slice(0, 30)];
  }).filter(([ratio]) => !(ratio >= 4.5));
})()"""


@needs_chromium
def test_tables_sort_and_themes_turn_by_keys(shown: Path) -> None:
    column = """(at => [...document.querySelectorAll('#table-a-wide-table tbody tr')].map(
        row => row.cells[at].textContent))"""
    with shared().page(shown) as page:
        head = "document.querySelectorAll('#table-a-wide-table thead th')"
        assert page.run(f"[...{head}].map(one => one.getAttribute('aria-sort')).join()") == ",".join(["none"] * 5)
        page.run(f"{head}[4].querySelector('button').focus()")
        page.press("Enter")
        numbers = page.run(f"{column}(4)")
        assert numbers == [*map(str, [n for n in range(40) if n != 3]), "-"]
        page.press(" ")
        assert page.run(f"{column}(4)") == [*map(str, [n for n in range(39, -1, -1) if n != 3]), "-"]
        assert page.run(f"{head}[4].getAttribute('aria-sort')") == "descending"
        page.run(f"{head}[0].querySelector('button').focus()")
        page.press("Enter")
        assert page.run(f"{column}(0)") == sorted(f"row {n % 7}" for n in range(40))
        page.run("document.querySelector('input.filter[data-table=table-a-wide-table]').focus()")
        page.press(*"row 3")
        assert page.run(
            "[...document.querySelectorAll('#table-a-wide-table tbody tr')].filter(one => !one.hidden).length"
        ) == sum(n % 7 == 3 for n in range(40))
        before = page.run("getComputedStyle(document.body).backgroundColor")
        page.run("document.getElementById('theme').focus()")
        page.press("Enter")
        assert page.run("getComputedStyle(document.body).backgroundColor") != before
        assert page.run("document.getElementById('theme').textContent") == "Light"
        assert page.console == []
    with shared().page(shown) as page:
        page.press("Tab")
        assert page.run("document.activeElement.className") == "skip"
        assert page.run("document.activeElement.getBoundingClientRect().left") >= 0
        page.press("Enter")
        assert page.run("location.hash") == "#content"
        assert page.console == []


@needs_chromium
def test_players_of_a_run_play_in_its_page(shown: Path) -> None:
    with shared().page(shown) as page:
        step = "document.querySelector('.tdp').innerText.match(/step \\d+ of \\d+/)?.[0]"
        assert page.wait(step).startswith("step 0 of")
        page.run("document.querySelector('.tdp').querySelector('button, [tabindex]').focus()")
        page.press("ArrowRight")
        assert page.wait(step).startswith("step 1 of")
        assert page.console == []


@needs_chromium
def test_data_is_saved_from_within_the_page(shown: Path) -> None:
    with shared().page(shown) as page:
        text = page.run(
            "fetch(document.querySelector('a[download=\"a-wide-table.csv\"]').href).then(one => one.text())"
        )
    table = [*csv.reader(io.StringIO(text))]
    assert len(table) == 41
    assert table[1][:6] == ["row 0", "0.0", "no", "0.5", "0.25", "0.75"]
