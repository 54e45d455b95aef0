"""``tdhook-rl steer``: a policy, vectors and an environment in; a sweep that goes on, a table and a report out."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml

from tdhook_rl.cli import main
from tdhook_rl.examples.agent import FC2
from tdhook_rl.files.durable import parse_json
from tdhook_rl.report import page_of, read_run
from tdhook_rl.sweeps import SteeringVector, SweepResult

SOURCE = """
from pathlib import Path
import torch
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical
from torchrl.modules import MLP, ProbabilisticActor, QValueActor
from torchrl.envs import GymEnv
from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor

def actor():
    torch.manual_seed(0)
    return make_actor()

def hooked():
    return ActivationCaching(FC2).prepare(actor())

def env():
    return CueCorners(max_steps=8)

class Stopping(CueCorners):
    steps = 0

    def _step(self, data):
        Stopping.steps += 1
        if Path("stop").exists() and Stopping.steps > 40:
            raise KeyboardInterrupt
        return super()._step(data)

def several():
    return Stopping(batch_size=[4], max_steps=8)

def cart():
    torch.manual_seed(0)
    net = MLP(in_features=4, out_features=2, num_cells=[16, 16])
    return QValueActor(net, in_keys=["observation"], spec=GymEnv("CartPole-v1").action_spec)

def numbers():
    torch.manual_seed(0)
    net = TensorDictModule(MLP(in_features=4, out_features=2, num_cells=[16, 16]), ["observation"], ["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)

def up(data):
    return (data["action"] == 0).float().mean(1)

def odd(rows):
    return rows["concept", "xor"] == 1

def away(start):
    return 1.0 - 2.0 * (start["concept", "paying_corner"] == 0)
"""
SMALL = ["--alphas", "1,2", "--controls", "2", "--episodes", "8", "--max-steps", "8", "--player", "0"]
CORNERS = ["steer", "--policy", "steered_agent:actor", "--env", "steered_agent:env", "--vector", "one=first"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "steered_agent.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(1)
    SteeringVector(vector=3 * torch.randn(64), path=FC2).save(tmp_path / "first")
    SteeringVector(vector=torch.randn(16), path="module.0.module.2").save(tmp_path / "cart")
    return tmp_path


def test_everything_is_written_and_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*CORNERS, *SMALL[:-2], "--player", "2", "--outcome", "steered_agent:up", "--sampled", "--out", "out"]
    command += ["--sign", "steered_agent:away", "--when", "steered_agent:odd"]
    assert main(command) == 0
    said = capsys.readouterr().out
    out = folder / "out"
    result = SweepResult.load(out)
    assert result.outcomes == ["up", "return", "length"]
    assert result.facts["exploration"].endswith("random")
    effect = result.effect("up")
    rows = list(csv.DictReader(io.StringIO((out / "effects.csv").read_text())))
    (row,) = [one for one in rows if one["outcome"] == "up" and float(one["alpha"]) == 2]
    assert float(row["effect"]) == pytest.approx(effect.estimate)
    assert float(row["effect (low)"]) == pytest.approx(effect.low)
    kept = json.loads((out / "steering.json").read_text())
    assert kept["rows"][1]["effect"] == pytest.approx(effect.estimate)
    assert kept["command"] == " ".join(["tdhook-rl", *command])
    page = (out / "report.html").read_text()
    # What can be saved from the page is what is in the files.
    links = [unquote(one) for one in re.findall(r'href="data:[^,]*,([^"]*)"', page)]
    assert (out / "effects.csv").read_text() in links
    (curve,) = [json.loads(one) for one in links if one.startswith("{") and "response" in one]
    assert curve["strengths"] == [0, 1, 2]
    assert curve["response"][2]["estimate"] == pytest.approx(result.mean("up", alpha=2.0).estimate)
    assert curve["random"] == result.control_response("up").tolist()
    assert set(curve["competence"]) == {"return", "length"}
    for words in ("one at alpha 2 changes up by", "Does one change up?", "What does one cost?", "data-player",
                  "actions drawn, from the same starts with the same noise", "not steered",
                  kept["command"]):  # fmt: skip
        assert words in page, words
    assert "one at alpha 2 changes up by" in " ".join(said.split())
    assert sorted(one.name for one in (out / "players").iterdir()) == ["steered.bin", "steered.json"]
    # From the folder alone the same page is made again, by another command.
    assert main(["report", "out"]) == 0
    again = page_of(read_run(out)).html()
    for words in ("Does one change up?", "data-player", "Every vector and strength", "up by strength of one"):
        assert words in again, words


def test_it_is_interrupted_in_one_line_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*CORNERS, *SMALL, "--env", "steered_agent:several"]
    (folder / "stop").touch()
    assert main([*command, "--out", "out"]) == 130
    line = capsys.readouterr().out.splitlines()[-1]
    played = re.search(r"stopped; (\d+) of 8 conditions are played; the same command goes on: tdhook-rl steer", line)
    assert played is not None, line
    assert 1 < int(played[1]) < 8
    assert main(["report", "out"]) == 0
    unfinished = (folder / "out" / "report.html").read_text()
    assert f"is at {played[1]} of 8 conditions" in unfinished
    assert "did not come to its end" in unfinished
    (folder / "stop").unlink()
    assert main([*command, "--out", "out"]) == 0
    assert main([*command, "--out", "whole"]) == 0
    resumed, whole = SweepResult.load("out"), SweepResult.load("whole")
    assert all(torch.equal(values, resumed.values[name]) for name, values in whole.values.items())
    # One page of both runs has what is found over them.
    page = page_of(["out", "whole"]).html()
    assert "Every vector and strength over 2 runs" in page
    assert "Thin lines are the 2 training runs" in page
    capsys.readouterr()
    assert main([*command, "--out", "out", "--when", "concept/xor"]) == 1
    assert "holds a sweep with another when" in capsys.readouterr().err


def test_options_in_a_file(folder: Path) -> None:
    options = {"policy": "steered_agent:actor", "env": "steered_agent:env", "vector": ["first"], "alphas": [1.0]}
    options |= {"controls": 0, "episodes": 4, "max-steps": 4, "player": 0, "sampled": True}
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    assert main(["steer", "--config", "options.yaml", "--episodes", "6"]) == 0
    found = SweepResult.load("runs/steer-steered_agent-env-first")
    assert found.values["return"].shape == (3, 6)
    config = parse_json(Path("runs/steer-steered_agent-env-first/config.json").read_text())
    assert config["options"]["episodes"] == 6
    assert config["weights"]


def test_an_environment_of_gymnasium(folder: Path) -> None:
    command = ["steer", "--policy", "steered_agent:cart", "--env", "CartPole-v1", "--vector", "cart", "--alphas=-1,1"]
    assert main([*command, *SMALL[2:-2], "--player", "1", "--out", "out"]) == 0
    found = SweepResult.load("out")
    assert found.paired
    assert found.alphas() == [-1.0, 0.0, 1.0]
    head = json.loads(Path("out/players/steered.json").read_text())["head"]
    assert head["sets"] == ["not steered", "cart, alpha 1"]
    assert head["views"]  # frames


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--policy": "steered_agent:actr"}, "nearest: 'actor'"),
        ({"--policy": "steered_agent:hooked"}, "return the plain one"),
        ({"--policy": "steered_agent:up"}, "called without arguments, but its signature is (data"),
        ({"--env": "CartPole-v9"}, "CartPole"),
        ({"--env": "steered_agent:envi"}, "nearest: 'env'"),
        ({"--vector": "nowhere"}, "nowhere"),
        ({"--vector": "cart"}, "16"),
        ({"--alphas": "a,b"}, "numbers with commas"),
        ({"--alphas": "0"}, "no strength but 0"),
        ({"--episodes": "0"}, "nothing to play"),
        ({"--outcome": "steered_agent:upp"}, "nearest: 'up'"),
        ({"--sign": "steered_agent:awy"}, "nearest: 'away'"),
        ({"--when": "concept/xr"}, "xr"),
        ({"--config": "absent.yaml"}, "no config"),
        ({"--out": "."}, "holds no sweep"),
        ({"--env": None}, "name the environment by --env"),
        ({"--policy": None}, "--policy"),
        ({"--vector": None}, "--vector"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(
    folder: Path, changed: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, str | None] = {"--policy": "steered_agent:actor", "--env": "steered_agent:env"}
    given |= {"--vector": "one=first", "--alphas": "1", "--controls": "1", "--episodes": "4", "--max-steps": "4"}
    given |= {"--player": "0", "--out": "out", **changed}
    assert main(["steer", *(word for name, value in given.items() if value for word in (name, value))]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tdhook-rl: ")
    assert message in said


def test_two_of_a_name_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CORNERS, *SMALL, "--vector", "one=first"]) == 1
    assert "two vectors are called 'one'" in capsys.readouterr().err
    assert main([*CORNERS, *SMALL, "--outcome", "steered_agent:up", "--outcome", "steered_agent:up"]) == 1
    assert "two outcomes are called 'up'" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["runs/lr=0.1/up", "lr=0.1", "up=lr=0.1", "up=runs/lr=0.1/up"])
def test_files_whose_folders_have_an_equal_sign(folder: Path, place: str) -> None:
    """As Hydra calls them."""
    for file in ("runs/lr=0.1/up", "lr=0.1"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        SteeringVector.load("first").save(file)
    assert main([*CORNERS[:-2], "--vector", place, *SMALL, "--out", "out"]) == 0
    assert SweepResult.load("out").vectors == ["lr=0.1" if place == "lr=0.1" else "up"]


def test_a_file_that_is_not_there_is_named_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CORNERS[:-2], "--vector", "runs/lr=0.2/up", *SMALL]) == 1
    assert "runs/lr=0.2/up" in capsys.readouterr().err


def test_an_environment_of_gymnasium_takes_actions_as_the_policy_gives_them(folder: Path) -> None:
    """Numbers of choices were the first choice at every step, in an environment that takes them one-hot."""
    command = ["steer", "--policy", "steered_agent:numbers", "--env", "CartPole-v1", "--vector", "cart", "--sampled"]
    assert main([*command, *SMALL, "--outcome", "steered_agent:up", "--out", "out"]) == 0
    first = SweepResult.load("out").of("up")
    assert 0 < float(first.mean()) < 1
    assert len(first.unique()) > 1
