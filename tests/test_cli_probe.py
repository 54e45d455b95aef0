"""``tdhook-rl probe``: a stored buffer in, a table and a report out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, ReplayBuffer

from tdhook_rl.cli import main, showing
from tdhook_rl.cli.options import named_file
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.probes import ProbeTable
from tdhook_rl.replay import probe_grid
from tdhook_rl.report.probe_grids import probe_grids, probe_page
from tdhook_rl.rollout import EPISODE, GroupSplit

SITE = "module.0.module.3"
SOURCE = """
from tdhook_rl.examples.agent import make_actor

def actor():
    return make_actor()

def first_light(data):
    return data["concept", "bits"][..., 0]
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a=b.pt", ("a", "b.pt")),
        ("runs/lr=0.1/b.pt", ("", "runs/lr=0.1/b.pt")),
        ("a=runs/lr=0.1/b.pt", ("a", "runs/lr=0.1/b.pt")),
        ("b.pt", ("", "b.pt")),
        ("epoch=3.pt", ("", "epoch=3.pt")),
        ("epoch=4.pt", ("epoch", "4.pt")),
    ],
)
def test_a_file_is_told_from_a_name_and_a_file(
    text: str, found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("epoch=3.pt").touch()
    assert named_file(text) == found


def rows(envs: int = 60) -> TensorDict:
    data = CueCorners(batch_size=[envs], seed=1).rollout(20, break_when_any_done=False)
    return data.set(EPISODE, torch.arange(envs)[:, None].expand(envs, 20).clone()).reshape(-1).detach()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_probe_setup.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    buffer = ReplayBuffer(storage=LazyMemmapStorage(1200, scratch_dir=tmp_path / "scratch"))
    buffer.extend(rows())
    buffer.dumps(tmp_path / "buffer")
    torch.save(make_actor().state_dict(), tmp_path / "later.pt")
    return tmp_path


def test_a_buffer_of_torchrl_becomes_a_table_and_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "probe", "buffer", "--policy", "my_probe_setup:actor", "--sites", SITE, "--concepts", "xor=concept/xor",
        "light=my_probe_setup:first_light", "--checkpoints", "later=later.pt", "--out", "out",
    ]  # fmt: skip
    assert main(command) == 0
    found = json.loads((folder / "out" / "probes.json").read_text())
    cells = found["cells"]
    assert found["command"] == " ".join(["tdhook-rl", *command])
    assert found["weights"]
    assert found["versions"]["torch"]
    assert [(cell["checkpoint"], cell["concept"]) for cell in cells] == [("later", "xor"), ("later", "light")]
    assert all(0 <= cell["trained"] <= 1 and cell["groups"] > 3 for cell in cells)
    page = (folder / "out" / "report.html").read_text()
    assert "Can xor be read?" in page
    assert "--checkpoints later=later.pt" in page
    assert "Which concepts can be read where" in page
    assert "report.html" in capsys.readouterr().out


def test_checkpoints_are_compared_beside_an_untrained_network(folder: Path) -> None:
    weights = make_actor().state_dict()
    broken = {name: torch.full_like(value, torch.nan) if ".2." in name else value for name, value in weights.items()}
    for name, state in (("one", weights), ("again", weights), ("broken", broken)):
        torch.save(state, folder / f"{name}.pt")
    command = ["probe", "buffer", "--policy", "my_probe_setup:actor", "--sites", "module.0.module.1", SITE]
    command += ["--concepts", "xor=concept/xor", "--out", "out", "--checkpoints", "one=one.pt", "again=again.pt"]
    assert main([*command, "broken=broken.pt"]) == 0
    found = json.loads((folder / "out" / "probes.json").read_text())["similarity"]
    assert 100 < found["states"] < 512  # those of the 512 that recur count once
    assert found["checkpoints"] == ["untrained", "one", "again", "broken"]
    first, second = (torch.tensor([[math.nan if one is None else one for one in line] for line in found["sites"][site]])
                     for site in ("module.0.module.1", SITE))  # fmt: skip
    assert first[1, 2] > 0.999 > first[0, 1] > -0.1
    assert first[1, 3] > 0.999  # before the layer that is broken
    assert second[3].isnan().all()
    assert second[1, 2] > 0.999
    page = (folder / "out" / "report.html").read_text()
    assert f"How alike checkpoints are at {SITE}" in page
    assert f"in {found['states']} states" in page


#: What rich would take for a style, a closing one, a picture; and a name that leaves no room.
ODD = ("[up]", "[/up]", ":door:", "a name that is longer than a terminal has columns" * 2)


@pytest.mark.parametrize("width", [0, 60, 400])
def test_what_is_printed_is_what_was_said(
    width: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe, in a narrow terminal and in a wide one: names and numbers whole, and the path is the folder's."""
    if width:
        monkeypatch.setattr(showing, "terminal", lambda wide=None: Console(
            markup=False, emoji=False, width=wide or width, force_terminal=True, color_system=None
        ))  # fmt: skip
        monkeypatch.setattr("tdhook_rl.cli.probe.terminal", showing.terminal)
    command = ["probe", "buffer", "--policy", "my_probe_setup:actor", "--sites", SITE, "--out", "[out]/:door:"]
    assert main([*command, "--concepts", *(f"{name}=concept/xor" for name in ODD)]) == 0
    printed = capsys.readouterr().out
    shown = "".join(printed.split())
    cells = json.loads((folder / "[out]" / ":door:" / "probes.json").read_text())["cells"]
    assert all(name.replace(" ", "") in shown for name in ODD if len(name) < 50 or not width)
    assert all(
        f"{cell['trained']:.3f}[{cell['trained_low']:.3f},{cell['trained_high']:.3f}]" in shown for cell in cells
    )
    assert shown.count(SITE) >= len(ODD)
    assert "…" not in printed
    assert "[out]/:door:/report.html  the report" in printed


def test_a_key_may_hold_a_slash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows().set("goal/xy", torch.randn(1200, 1)).set(("info", "a/b"), torch.randn(1200, 1))
    data.memmap(folder / "named")
    command = ["probe", "named", "--policy", "my_probe_setup:actor", "--sites", SITE, "--out", "out"]
    assert main([*command, "--concepts", "goal/xy", "b=info/a/b", "--split", "concept/cell"]) == 0
    cells = json.loads((folder / "out" / "probes.json").read_text())["cells"]
    assert [cell["concept"] for cell in cells] == ["goal/xy", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffer": "nowhere"}, "nowhere"),
        ({"concept/xor": "concept/xorr"}, "nearest"),
        ({"concept/xor": "my_probe_setup:light"}, "nearest: 'first_light'"),
        ({SITE: "module.9"}, "module.9"),
        ({"later.pt": "sooner.pt"}, "there is no file"),
        ({"collector/traj_ids": "nowhere"}, "the split"),
    ],
)
def test_what_is_not_there_is_named(
    folder: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "probe", "buffer", "--policy", "my_probe_setup:actor", "--sites", SITE, "--concepts", "concept/xor",
        "--checkpoints", "later.pt", "--split", "collector/traj_ids", "--out", "out",
    ]  # fmt: skip
    assert main([change.get(one, one) for one in command]) == 1
    assert message in capsys.readouterr().err


def test_pages_of_tables_of_all_kinds(tmp_path: Path) -> None:
    data, actor = rows(100), make_actor()
    concepts = {
        "xor": ("concept", "xor"),
        "<b>$x_1$": lambda td: td["observation"][..., 3].double() + 1e-3 * torch.rand(2000),
    }
    for checkpoints in (None, {"a": actor, "b": make_actor()}):
        table = probe_grid(
            actor, data, sites=[SITE], concepts=concepts, checkpoints=checkpoints, split=GroupSplit(EPISODE)
        )
        drawings = probe_grids(table)
        assert len(drawings) == 2
        assert len({str(one.title) for one in drawings}) == 2
        page = probe_page(table).html()
        assert "<b>$x_1$" not in page
        assert "&lt;b&gt;$x_1$" in page
    without = probe_grid(actor, data, sites=[SITE], concepts={"xor": ("concept", "xor")}, untrained=False)
    assert "minus chance" in probe_grids(without)[0].alt
    assert probe_grids(ProbeTable([])) == []
