"""Runs to report, and what every page of them promises."""

from __future__ import annotations

import html.parser
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
import wandb
from torch.utils.tensorboard import SummaryWriter
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze
from tdhook_rl.report import (
    Animation,
    Artifact,
    DataTable,
    Finding,
    FolderSink,
    Histogram,
    Image,
    Monitor,
    Page,
    player,
    save_findings,
)
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tdhook_rl.statistics import Interval
from tests.wandb_reader import finished

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)


def make_runs(base: Path) -> dict[str, Path]:
    """One run, logged by a monitor into everything that a report is made of; and an analysis."""
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
    run.log({"own/loss": 0.25, "train": {"loss": 0.5, "deep": {"x": 2}}})
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


def written(folder: Path, values: dict[str, list[float]], **config: Any) -> Path:
    sink = FolderSink(folder)
    sink.describe(config)
    for step in range(max(map(len, values.values()), default=0)):
        sink.log({name: curve[step] for name, curve in values.items() if step < len(curve)}, 100 * step)
    sink.summarise({})
    sink.close()
    return folder


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
    Drawing(figure=a_figure(), title="A line", alt="It rises.", data={"y": [0, 1]}).save(
        folder / "figures" / "line.png"
    )
    sink.summarise({"success": 0.75})
    sink.close()
    return folder


def a_figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1])
    return figure


def interval(estimate: float = 0.5, low: float = 0.25, high: float = 0.75) -> Interval:
    return Interval(estimate=estimate, low=low, high=high, confidence=0.95, method="t", groups=9, rows=90)
