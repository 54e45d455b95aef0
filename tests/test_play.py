"""Episodes that start alike, and the command that plays them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrl.envs import GymEnv

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import SteeringVector
from tdhook_rl.rollout import alike_episodes
from tests.policies import actor

SOURCE = """
from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor

def unsteered():
    return ActivationCaching(FC2).prepare(make_actor(), return_context=False), CueCorners
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_players.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def told(page: str) -> dict[str, Any]:
    found = json.loads(re.search(r'application/json">(.*?)</script>', Path(page).read_text(), re.DOTALL)[1])
    return {name: value for name, value in found.items() if name != "data"}


def steerable() -> Any:
    method = Compose(SteeringVectors({FC2: torch.ones(64)}, alpha=0.0), Saliency())
    return method.prepare(make_actor(), return_context=False)


@pytest.mark.parametrize("batch_size", [[], [2], [2, 3]])
def test_episodes_are_whole_and_come_again(batch_size: list[int]) -> None:
    env, policy = CueCorners(batch_size=batch_size, max_steps=9), steerable()
    before = torch.random.get_rng_state()
    found, again = (alike_episodes(policy, env, episodes=5, max_steps=12, seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(found) == 5
    for one, other in zip(found, again, strict=True):
        assert one.ndim == 1
        assert one["next", "done"].flatten().tolist() == [False] * (len(one) - 1) + [True]
        assert torch.equal(one["action"], other["action"])
        assert torch.equal(one["attr", "observation"], other["attr", "observation"])
    starts = torch.stack([one["observation"][0] for one in found])
    assert len(starts.unique(dim=0)) > 1
    policy.controls["steering.alpha"] = 9.0
    steered = alike_episodes(policy, env, episodes=5, max_steps=12, seed=3)
    assert torch.equal(starts, torch.stack([one["observation"][0] for one in steered]))
    pairs = zip(found, steered, strict=True)
    assert any(len(one) != len(other) or (one["action"] != other["action"]).any() for one, other in pairs)


def test_episodes_of_a_gymnasium_environment_start_alike() -> None:
    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with ActivationCaching("module.0.module.0.1").prepare(actor(net)) as policy:
        found, again = (alike_episodes(policy, env, episodes=2, max_steps=15) for _ in range(2))
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one["observation"], other["observation"])
    assert not torch.equal(found[0]["observation"][0], found[1]["observation"][0])
    for wrong in ({"episodes": 0}, {"max_steps": 0}):
        with pytest.raises(InputError, match="positive integer"):
            alike_episodes(policy, env, **wrong)


def test_the_command_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", "--episodes", "3", "--steps", "10", "--out", "found/page.html"]) == 0
    assert "found/page.html" in capsys.readouterr().out
    head = told("found/page.html")
    assert [len(one["parts"]) for one in head["episodes"]] == [1, 1, 1]
    assert {"attribution", "activation", "choice", "chosen"} <= {one["kind"] for one in head["tracks"]}


@pytest.mark.parametrize("compare", ["steered", "untrained"])
def test_two_are_played_side_by_side(compare: str) -> None:
    vector = SteeringVector(vector=torch.randn(64) * 9, path=FC2)
    vector.save("corner")
    arguments = ["--vector", "corner", "--alpha", "2"] if compare == "steered" else ["--compare", "untrained"]
    assert main(["play", "--episodes", "2", *arguments]) == 0
    head = told("player.html")
    assert head["sets"] == (["plain", "steered, alpha 2"] if compare == "steered" else ["as it is", "untrained"])
    assert all(None not in one["parts"] for one in head["episodes"])
    assert any(one["differs"].get("observation", 1) > 0 and one["differs"] for one in head["episodes"])
    controls = [one["name"] for one in head["tracks"] if one.get("role") == "control"]
    assert controls == (["steering.alpha"] if compare == "steered" else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "untrained", "--vector", "corner"], "leave one out"),
        (["users_players:unsteered", "--compare", "steered"], "add SteeringVectors"),
        (["users_players:unsteered", "--alpha", "nan"], "finite"),
        (["--vector", "elsewhere"], r"nearest: 'module\.0\.module\.3'"),
        (["--vector", "absent"], "no artifact"),
        (["--episodes", "0"], "positive integer"),
        (["users_players:unstered"], "nearest: 'unsteered'"),
    ],
)
def test_what_cannot_be_played_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    SteeringVector(vector=torch.ones(64), path=FC2).save("corner")
    SteeringVector(vector=torch.ones(64), path="module.0.module.5").save("elsewhere")
    assert main(["play", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not Path("player.html").exists()


def test_an_environment_may_be_made_by_a_function() -> None:
    assert main(["play", "users_players:unsteered", "--episodes", "1", "--deterministic"]) == 0
    assert told("player.html")["views"][0]["name"] == "state"
