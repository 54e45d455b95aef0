"""The six experiments, on the agents that come with the package: the science, without training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from tdhook_rl.cli import main
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.experiments import COLUMNS, EXPERIMENTS, RECIPES, SEEDS, Check, Findings, experiment, load, make
from tdhook_rl.experiments import checkpoints as shipped
from tdhook_rl.experiments.findings import share
from tdhook_rl.experiments.training import train, untrained
from tdhook_rl.report import read_run


def shown(findings: Findings) -> str:
    return "\n".join(" | ".join(check.row) for check in findings.checks)


@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:])])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_is_as_expected(name: str, seed: int, tmp_path: Path) -> None:
    chosen = experiment(name)
    findings = chosen.measure(load(chosen.agent, seed))
    assert findings.met, shown(findings)
    for drawing in chosen.plot(findings):
        assert drawing.save(tmp_path / "figure.png").stat().st_size > 5000


#: An agent that knows nothing is far from the limits, whatever is measured of it: an eighth of the episodes and states.
FEW = {"EPISODES": 128, "STATES": 250}


@pytest.mark.parametrize("sizes", [FEW, pytest.param({}, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_untrained_agent_does_not_pass(name: str, sizes: dict[str, int], monkeypatch) -> None:
    chosen = EXPERIMENTS[name]
    trained = load(chosen.agent, 0)
    pretender = dataclasses.replace(trained, agent=trained.untrained, snapshots={})
    home = sys.modules[chosen.measure.__module__]
    for size in sizes.keys() & vars(home).keys():
        monkeypatch.setattr(home, size, sizes[size])
    if name == "patching":
        with pytest.raises(InputError, match="changes no action"):
            chosen.measure(pretender)
        return
    findings = chosen.measure(pretender)
    assert not findings.met, shown(findings)


def test_a_check_reads_its_limits() -> None:
    assert Check("x", 0.5, low=0.5, high=0.5).met
    assert not Check("x", 0.49, low=0.5).met
    assert not Check("x", 0.51, high=0.5).met
    assert not Check("x", float("nan"), low=0.5).met
    row = Check("x", 1.23456e-5, high=1.0, beside="y").row
    assert row == ("x", "1.2e-05", "at most 1", "y", "yes")
    assert len(row) == len(COLUMNS)
    estimated = Check("x", share(0.9, 50), low=0.95)
    assert estimated.figure == 0.9
    assert not estimated.met  # an interval that reaches the limit is no excuse, but it is shown
    assert estimated.row[1].startswith("0.900 (0.776 to 0.968)")


# ---------------------------------------------------------------------- agents


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_repeatable_and_a_checkpoint_holds_all(name: str, tmp_path: Path, monkeypatch) -> None:
    size = 128 * RECIPES[name].steps
    short = dataclasses.replace(RECIPES[name], frames=3 * size, snapshots=(size, 2 * size))
    monkeypatch.setitem(RECIPES, name, short)
    steps = []
    first = make(name, 5, tmp_path, lambda what, done, of: steps.append((done, of)))
    assert steps == [(size, 3 * size), (2 * size, 3 * size), (3 * size, 3 * size)]
    again, states = train(short, 5)
    read = load(name, 5, tmp_path)
    for part in short.saved:
        expected = getattr(again, part).state_dict()
        for trained in (first, read):
            for key, value in getattr(trained.agent, part).state_dict().items():
                assert torch.equal(value, expected[key]), key
    assert list(read.snapshots) == list(states) == [size, 2 * size]
    head = list(states[size])[-1]
    assert torch.equal(read.snapshots[size].actor.state_dict()[head], states[size][head])
    assert not torch.equal(states[size][head], states[2 * size][head])
    before = untrained(short, 5).actor.state_dict()
    assert torch.equal(read.untrained.actor.state_dict()[head], before[head])
    assert not torch.equal(again.actor.state_dict()[head], before[head])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_agent_that_is_trained_now_passes(name: str) -> None:
    chosen = experiment(name)
    findings = chosen.measure(make(chosen.agent, 0))
    assert findings.met, shown(findings)


def test_every_checkpoint_is_there_and_small() -> None:
    for name in RECIPES:
        for seed in SEEDS:
            assert (shipped.FOLDER / f"{name}_{seed}.safetensors").stat().st_size < 500_000


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact"):
        load("cheese", 7)
    file = shipped.FOLDER / "t_maze_0.safetensors"
    (tmp_path / "t_maze_0.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a readable"):
        load("t_maze", 0, tmp_path)
    (tmp_path / "known_value_0.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ArtifactError, match="does not fit the agent"):
        load("known_value", 0, tmp_path)
    with pytest.raises(InputError, match="nearest: 't_maze'"):
        load("tmaze", 0)


# ---------------------------------------------------------------------- the command


def test_the_command_writes_a_report(tmp_path: Path, capsys) -> None:
    assert main(["experiment", "patching", "--seed", "1", "--out", str(tmp_path / "found")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "Which activations carry the decision?" in output
    assert "report.html" in output.replace(" ", "")
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count('<svg role="img"') == 1
    assert (tmp_path / "found" / "figures" / "patching.json").exists()
    assert page.count('class="met yes"') == len(read_run(tmp_path / "found").findings) == 5
    assert "tdhook-rl experiment patching --seed 1" in page


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys) -> None:
    assert main(["experiment", "probes", "--out", str(tmp_path / "a")]) == 1
    assert "nearest: 'probing'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["experiment", "patching", "--seed", "9", "--out", str(tmp_path / "b")]) == 1
    assert "add --train" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (InputError("no such luck"), 1)])
def test_the_command_keeps_what_was_finished(error: BaseException, code: int, tmp_path: Path, monkeypatch) -> None:
    def fail(trained: object) -> Findings:
        raise error

    failing = dataclasses.replace(EXPERIMENTS["steering"], measure=fail)
    both = {"patching": EXPERIMENTS["patching"], "steering": failing}
    monkeypatch.setattr("tdhook_rl.experiments.EXPERIMENTS", both)
    assert main(["experiment", "all", "--out", str(tmp_path / "found")]) == code
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count('<ul class="answers') == 1
    assert page.count("<svg role=") == 1
