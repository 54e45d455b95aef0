"""A command that ends by a mistake leaves the disk as it was: no folder without a result in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tdhook_rl.cli import main
from tdhook_rl.examples.agent import FC2
from tdhook_rl.latent import SteeringVector

SOURCE = """
from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor

def actor():
    return make_actor()

def env():
    return CueCorners(max_steps=4)

def pair():
    return ActivationCaching(FC2).prepare(actor(), return_context=False), env()

def wrong(data):
    return data["nowhere"]

def empty():
    return None
"""
PROBE = "probe rows --policy left_agent:actor --sites module.0 --concepts light --split episode"
STEER = "steer --policy left_agent:actor --env left_agent:env --vector one --alphas 1 --controls 1 --episodes 4"
ANALYZE = "analyze rows --policy left_agent:actor --method saliency"
#: Commands, and what is wrong with them: what is said before work begins, and what the work finds.
MISTAKES = [
    *(PROBE.replace(right, wrong) for right, wrong in (
        ("rows", "nowhere"), ("module.0", "module.9"), ("light", "lite"), ("light", "left_agent:wrong"),
        ("episode", "episodes"), ("--split", "--batch-size 0 --split"), ("--split", "--held-out 2 --split"),
        ("--split", "--checkpoints none.pt --split"), ("actor", "empty"), ("actor", "aktor"),
    )),
    *(STEER.replace(right, wrong) for right, wrong in (
        ("--alphas 1", "--alphas 0"), ("--episodes 4", "--episodes 0"), ("--vector one", "--vector nowhere"),
        ("--vector one", "--vector other"), ("--controls 1", "--controls -1"), ("--controls 1", "--when nowhere"),
        ("--controls 1", "--outcome left_agent:wrong"), ("left_agent:env", "left_agent:empty"),
    )),
    *(ANALYZE.replace(right, wrong) for right, wrong in (
        ("rows", "nowhere"), ("saliency", "activation_caching"), ("saliency", "activation_caching --sites module.9"),
        ("saliency", "saliency --fraction 2"), ("saliency", "saliency --batch-size 0"),
        ("saliency", "saliency --rows 9:"), ("saliency", "saliency --where left_agent:wrong"),
        ("saliency", "saliency --workers 0 --engine ray"),
    )),
    "demo --frames 0", "demo --workers -1", "demo --frames -5 --workers 0",
    "experiment probing --seed 5", "experiment nothing",
    "report nowhere", "report rows", "play left_agent:pair --episodes 0", "play left_agent:pair --steps 0",
    "play left_agent:pair --compare steered", "play left_agent:pair --vector other",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "left_agent.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 8
    data = {"observation": torch.randn(count, 90), "action": torch.zeros(count, dtype=torch.long)}
    data |= {"light": torch.arange(count) % 2, "episode": torch.arange(count)}
    TensorDict(data, [count]).memmap(tmp_path / "rows")
    SteeringVector(vector=torch.randn(64), path=FC2).save(tmp_path / "one")
    SteeringVector(vector=torch.randn(3), path=FC2).save(tmp_path / "other")
    return tmp_path


def paths(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if "__pycache__" not in one.parts)


@pytest.mark.parametrize("out", ["", "new", "far/below/new", "empty"])
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_leaves_no_folder(command: str, out: str, here: Path) -> None:
    (here / "empty").mkdir()
    before = paths(here)
    words = command.split()
    if out:
        words += ["--out", f"{out}/page.html" if words[0] == "play" else out]
    try:
        status = main(words)
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    assert status not in (0, None)
    assert paths(here) == before
