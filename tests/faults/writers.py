"""What writes files: for each writer what it writes, what a reader gets of it, and whether the same call goes on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, LinearProbe, Saliency, targets
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.durable import read_json, write_text
from tdhook_rl.replay import analyze, load_parquet, load_results, results, to_parquet
from tdhook_rl.report import FileSink, Finding, FolderSink, Histogram, Image
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.media import Artifact
from tdhook_rl.report.page.findings_file import load_findings, save_findings
from tdhook_rl.report.page.page import Page
from tdhook_rl.sweeps import SteeringVector, SweepResult, steering_sweep

ROWS = 40


@dataclass(frozen=True)
class Writer:
    """Something that writes into a folder.

    Attributes:
        write: does it.
        read: what a reader gets, in a form that compares by ``==``; raises where nothing can be read.
        before: what is in the folder already.
        errors: what may be raised, beside the library's own errors.
        partly: whether a reader's value after a fault is right, where a part of it may be missing after a warning.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    before: Callable[[Path], Any] = field(default=lambda folder: None)
    errors: tuple[type[Exception], ...] = ()
    partly: Callable[[Any, Any], bool] | None = None


# ------------------------------------------------------------------ analyses


class Stop(Exception):
    pass


def _network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def buffer(rows: int = ROWS) -> ReplayBuffer:
    generator = torch.Generator().manual_seed(1)
    found = ReplayBuffer(storage=LazyTensorStorage(rows))
    found.extend(TensorDict({"observation": torch.randn(rows, 4, generator=generator)}, [rows]))
    return found


_BUFFER: list[ReplayBuffer] = []


def analysed(folder: Path, stop: int | None = None, **options: Any) -> TensorDict:
    """An analysis in four chunks, each of which is brought to the disk; it may stop after so many rows."""
    if not _BUFFER:
        _BUFFER.append(buffer())

    def progress(done: int, size: int) -> None:
        if done == stop:
            raise Stop

    method = Compose(ActivationCaching("1"), Saliency(target=targets.logit(0)))
    share = results.SHARE
    results.SHARE = float("inf")  # at once
    try:
        with method.prepare(_network(), in_keys=["observation"], out_keys=["logits"]) as hooked:
            return analyze(hooked, _BUFFER[0], folder, batch_size=10, progress=progress, **options)
    finally:
        results.SHARE = share


def stopped(folder: Path) -> None:
    """Half an analysis."""
    try:
        analysed(folder, stop=20)
    except Stop:
        return


def damaged(folder: Path) -> None:
    """Half an analysis, of which something never reached the disk."""
    stopped(folder)
    path = folder / "cache" / "1.memmap"
    path.write_bytes(bytes(path.stat().st_size))


def results_in(folder: Path) -> dict[str, bytes]:
    """The bytes of finished results, held against their checksums."""
    load_results(folder, verify=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.memmap"))}


# ------------------------------------------------------------------ others


def _artifact(value: float) -> Callable[[Path], Any]:
    return lambda folder: save_artifact(
        folder / "a", "kind", {"x": torch.full((50,), value)}, {"value": value, "text": "x" * 100}
    )


def _artifact_in(folder: Path) -> Any:
    tensors, facts = load_artifact(folder / "a", "kind")
    if (folder / "a.json").exists():
        read_json(folder / "a.json", "the facts for people")
    return tensors["x"].tolist(), facts["value"]


def _results(rows: int = ROWS) -> TensorDict:
    return TensorDict({"attr": {"observation": torch.arange(rows * 3.0).reshape(rows, 3)}}, [rows])


def _episodes() -> ReplayBuffer:
    data = TensorDict(
        {
            "observation": torch.arange(ROWS * 2.0).reshape(ROWS, 2),
            "action": torch.zeros(ROWS, 1),
            ("next", "reward"): torch.ones(ROWS, 1),
            ("next", "done"): (torch.arange(ROWS) % 10 == 9)[:, None],
            ("collector", "traj_ids"): torch.arange(ROWS) // 10,
        },
        [ROWS],
    )
    found = ReplayBuffer(storage=LazyTensorStorage(ROWS))
    found.extend(data)
    return found


def _numbers(path: Path) -> Any:
    return load_parquet(path)["attr", "observation"].tolist()


def _log(folder: Path) -> None:
    sink = FolderSink(folder / "run")
    sink.describe({"lr": 0.1})
    for step in range(4):
        picture = Image(np.full((3, 3), step / 4))
        sink.log({"loss": step + 0.25, "return": 2.0 * step, "map": picture}, step)
        sink.log({"weights": Histogram(np.arange(4), np.arange(5.0))}, step)
    with tempfile.TemporaryDirectory() as elsewhere:
        part = Path(elsewhere) / "part"
        part.write_bytes(b"0123456789" * 10)
        sink.log({"file": Artifact([part], kind="probe", facts={})}, 4)
    sink.note("something")
    sink.summarise({"loss": 3.25})
    sink.close()


def _logged(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    if not (run / "log.csv").exists():
        raise ArtifactError("no log")
    found: dict[str, Any] = {f"{name} {step}": value for name, curve in FileSink.read(run / "log.csv").items()
                             for step, value in curve}  # fmt: skip
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("log.csv", "notes.txt"):
            found[str(path.relative_to(run))] = path.read_bytes()
    if "histograms.jsonl" in found:
        found |= {f"histogram {json.loads(line)['step']}": True for line in found.pop("histograms.jsonl").splitlines()}
    return found


def _right_as_far_as_it_goes(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(name in expected and expected[name] == value for name, value in found.items())


def _sweep(folder: Path) -> SweepResult:
    from tdhook_rl.sweeps import sweep_file
    from tests.faults.agents import actor, env

    between = sweep_file.BETWEEN
    sweep_file.BETWEEN = -1.0  # written after every condition
    try:
        return steering_sweep(actor(), env, {"v": {"module.0.module.0": torch.ones(8)}}, alphas=(1.0,), controls=1,
                              episodes=2, max_steps=4, folder=folder / "sweep")  # fmt: skip
    finally:
        sweep_file.BETWEEN = between


def _swept(folder: Path) -> Any:
    return {name: value.tolist() for name, value in SweepResult.load(folder / "sweep").values.items()}


def _figure(value: float) -> Drawing:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0.0, value])
    return Drawing(figure=figure, title="a", alt="a line", caption="", data={"x": value})


def _drawing(ending: str, value: float = 1.0) -> Callable[[Path], Any]:
    return lambda folder: _figure(value).save(folder / f"a{ending}")


def _drawn(ending: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        content = (folder / f"a{ending}").read_bytes()
        if ending == ".png":
            from PIL import Image as Pillow

            with Pillow.open(folder / "a.png") as picture:
                picture.load()
        elif not content.rstrip().endswith(b"</svg>"):
            raise AssertionError("half a drawing")
        return read_json(folder / "a.json", "data")["data"]["x"] in (0.5, 1.0)

    return read


def _page(text: str) -> Callable[[Path], Any]:
    return lambda folder: Page(title=text, lead="x", parts=[]).save(folder / "report.html")


def _page_in(folder: Path) -> Any:
    text = (folder / "report.html").read_text()
    assert text.endswith("</html>\n")
    return "<h1>one</h1>" in text or "<h1>two</h1>" in text


_PLAYER: list[Any] = []


def _player() -> Any:
    if not _PLAYER:
        from tdhook_rl.report import player
        from tests.players import corners

        policy, env, data = corners()
        _PLAYER.append(player(data, policy=policy, env=env))
    return _PLAYER[0]


def _played(folder: Path) -> Any:
    from tdhook_rl.report import Player

    return Player.load(folder).fragment(with_code=False) == _player().fragment(with_code=False)


def _player_page(folder: Path) -> Any:
    text = (folder / "player.html").read_text()
    assert text.rstrip().endswith("</html>"), "half a page"
    return True


PROBE = LinearProbe(weight=torch.eye(2, 3), bias=torch.zeros(2), path="1")
VECTOR = SteeringVector(vector=torch.ones(3), path="1", facts={"source": "mean"})
FINDING = Finding(question="Is it?", measured="share", value=0.5, met=True)


def _text(text: str) -> Callable[[Path], None]:
    return lambda folder: write_text(folder / "file", text)


WRITERS: dict[str, dict[str, Writer]] = {
    "replay": {
        "an analysis": Writer(lambda folder: analysed(folder / "found"), lambda folder: results_in(folder / "found")),
        "an analysis of some rows": Writer(
            lambda folder: analysed(folder / "found", rows=torch.arange(0, ROWS, 2)),
            lambda folder: results_in(folder / "found"),
        ),
        "an analysis that goes on": Writer(
            lambda folder: analysed(folder / "found"), lambda folder: results_in(folder / "found"),
            before=lambda folder: stopped(folder / "found"),
        ),
        "an analysis that is mended": Writer(
            lambda folder: analysed(folder / "found"), lambda folder: results_in(folder / "found"),
            before=lambda folder: damaged(folder / "found"),
        ),
        "a file of Parquet": Writer(
            lambda folder: to_parquet(_results(), folder / "a.parquet", chunk=16),
            lambda folder: _numbers(folder / "a.parquet"),
        ),
        "a data set of Parquet": Writer(
            lambda folder: to_parquet(_results(), folder / "set", _episodes(), chunk=16),
            lambda folder: _numbers(folder / "set"),
        ),
    },
    "artifacts": {
        "an artifact": Writer(_artifact(1.0), _artifact_in),
        "an artifact in the place of another": Writer(_artifact(1.0), _artifact_in, before=_artifact(0.0)),
        "a probe": Writer(
            lambda folder: PROBE.save(folder / "p"), lambda folder: LinearProbe.load(folder / "p").weight.tolist()
        ),
        "a vector": Writer(
            lambda folder: VECTOR.save(folder / "v"), lambda folder: SteeringVector.load(folder / "v").vector.tolist()
        ),
    },
    "files": {
        "a text": Writer(_text("new"), lambda folder: (folder / "file").read_text(), errors=(OSError,)),
        "a text in the place of another": Writer(
            _text("new"), lambda folder: (folder / "file").read_text(), before=_text("old"), errors=(OSError,)
        ),
    },
    "report": {
        "the folder of a run": Writer(_log, _logged, partly=_right_as_far_as_it_goes),
        "findings": Writer(lambda folder: save_findings(folder, [FINDING]),
            lambda folder: load_findings(folder / "findings.json")[0].met),
        "a page": Writer(_page("one"), _page_in),
        "a page in the place of another": Writer(_page("one"), _page_in, before=_page("two")),
        "a page with its drawings": Writer(
            lambda folder: Page(title="one", lead="x", parts=[_figure(1.0)]).keep(folder), _page_in
        ),
        "a drawing as PNG": Writer(_drawing(".png"), _drawn(".png")),
        "a drawing as SVG": Writer(_drawing(".svg"), _drawn(".svg")),
        "a drawing in the place of another": Writer(_drawing(".png"), _drawn(".png"), before=_drawing(".png", 0.5)),
        "a player": Writer(lambda folder: _player().save(folder / "player.html"), _player_page),
        "a player beside a run": Writer(lambda folder: _player().record(folder), _played),
    },
    "sweeps": {
        "a sweep": Writer(_sweep, _swept),
        "a sweep's result": Writer(lambda folder: _result().save(folder / "sweep"), _swept),
    },
}  # fmt: skip


_RESULT: list[SweepResult] = []


def _result() -> SweepResult:
    if not _RESULT:
        with tempfile.TemporaryDirectory() as folder:
            _RESULT.append(_sweep(Path(folder)))
    return _RESULT[0]
