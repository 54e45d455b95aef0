"""The command ``tdhook-rl analyze``: flags and files, going on, and the report."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tdhook_rl import Saliency, targets
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import in_order, load_results
from tdhook_rl.replay.results import Results

ROWS = 120
SOURCE = """
import torch
from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.examples.agent import FC2, make_actor

def plain():
    torch.manual_seed(0)
    return make_actor()

def hooked():
    return ActivationCaching(FC2).prepare(plain())

def with_environment():
    return hooked(), None

def rows():
    from tdhook_rl.reading.folders import open_folder
    from pathlib import Path
    return open_folder(Path("buffer"))

def late(batch):
    return batch["concept", "xor"] == 1
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(500), batch_size=4)
    data = CueCorners(batch_size=[6], seed=0).rollout(20, make_actor(), break_when_any_done=False)
    buffer.extend(data.reshape(-1).detach())
    buffer.dumps(folder / "buffer")
    (folder / "users_own_agent.py").write_text(SOURCE)
    return folder


@pytest.fixture(autouse=True)
def _there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    monkeypatch.syspath_prepend(str(saved))


PLAIN = ["--policy", "users_own_agent:plain"]


def test_results_and_a_report(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "buffer", *PLAIN, "--method", "saliency", "--target", "chosen_logit"]) == 0
    found = load_results("runs/analyze-buffer")
    torch.manual_seed(0)
    with Saliency(target=targets.chosen_logit()).prepare(make_actor()) as policy:
        _, rows = next(iter(in_order("buffer", 1000)))
        expected = policy.annotate(rows)
    torch.testing.assert_close(found["attr", "observation"], expected["attr", "observation"])
    page = Path("runs/analyze-buffer/report.html").read_text()
    assert "tdhook-rl analyze buffer --policy users_own_agent:plain --method saliency --target chosen_logit" in page
    assert "attr.observation" in page
    assert "Return of the episodes that are whole in the buffer" in page
    said = capsys.readouterr().out
    assert "the results of 120 entries" in said
    # Again: what is there is held against what the policy computes, and is kept.
    assert main(["analyze", "buffer", *PLAIN, "--method", "saliency", "--target", "chosen_logit"]) == 0
    assert main(["analyze", "buffer", *PLAIN, "--method", "saliency", "--target", "entropy"]) == 1
    assert "name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_config_file_says_what_flags_say(ending: str, saved: Path, tmp_path: Path) -> None:
    told = {
        "policy": "users_own_agent:plain", "method": {"saliency": {"absolute": False}, "activation_caching": None},
        "sites": [FC2], "batch-size": 16, "fraction": 0.5, "target": "entropy", "out": str(tmp_path / "told"),
    }  # fmt: skip
    config = tmp_path / f"config.{ending}"
    config.write_text(json.dumps(told))  # which is YAML as well
    assert main(["analyze", "buffer", "--config", str(config)]) == 0
    found = load_results(tmp_path / "told")
    assert len(found) == 60
    assert ("cache", FC2) in found.keys(True, True)
    assert (found["attr", "observation"] < 0).any()
    if ending == "json":
        return
    out = str(tmp_path / "flags")
    assert main(["analyze", "buffer", "--config", str(config), "--fraction", "0.1", "--out", out]) == 0
    assert len(load_results(out)) == 12  # a flag goes first


def test_a_hooked_policy_and_rows_of_a_function(saved: Path, tmp_path: Path) -> None:
    for number, target in enumerate(("hooked", "with_environment")):
        out = str(tmp_path / str(number))
        options = ["--policy", f"users_own_agent:{target}", "--out", out, "--where", "users_own_agent:late"]
        assert main(["analyze", "users_own_agent:rows", *options]) == 0
        found = load_results(out)
        assert "index" in found.keys()
        assert 0 < len(found) < ROWS


def test_time_is_over(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "buffer", "--policy", "users_own_agent:hooked", "--out", str(tmp_path), "--batch-size", "50"]
    assert main([*command, "--time-budget", "0"]) == 0
    said = capsys.readouterr().out
    assert "50 of 120 entries are done" in said
    assert "the results of 50 entries" in said
    assert main([*command, "--rows", ":"]) == 1  # another analysis
    assert main(command) == 0
    assert len(load_results(tmp_path)) == ROWS


def test_ctrl_c_says_how_to_go_on(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["analyze", "buffer", "--policy", "users_own_agent:hooked", "--out", str(tmp_path / "out")]
    arguments += ["--batch-size", "20"]
    write, calls = Results.write, []

    def interrupted(self: Results, *given: object) -> None:
        write(self, *given)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", interrupted)
        assert main(arguments) == 130
    said = capsys.readouterr()
    assert said.err == ""
    [line] = said.out.splitlines()
    assert line.startswith(
        "tdhook-rl: stopped; 60 of 120 entries are done; the same command goes on: tdhook-rl analyze"
    )
    assert main(arguments) == 0
    assert len(load_results(tmp_path / "out", verify=True)) == ROWS


@pytest.mark.parametrize("name", ["occlusion", "sarfa"])
def test_methods_have_the_names_of_their_classes(name: str, saved: Path, tmp_path: Path) -> None:
    """Those that are one room further down too."""
    assert main(["analyze", "buffer", *PLAIN, "--method", name, "--rows", ":4", "--out", str(tmp_path / "out")]) == 0
    assert bool(load_results(tmp_path / "out")["attr", "observation"].isfinite().all())


WRONG = {
    "no method": (["buffer", *PLAIN], "name what to compute by --method, .*saliency"),
    "no such method": (["buffer", *PLAIN, "--method", "salience"], "no method 'salience'; nearest: 'saliency'"),
    "what all methods are": (["buffer", *PLAIN, "--method", "method"], "no method 'method'"),
    "no such target": (["buffer", *PLAIN, "--method", "saliency", "--target", "entropie"], "nearest: 'entropy'"),
    "no sites": (["buffer", *PLAIN, "--method", "activation_caching"], "name them by --sites"),
    "methods twice": (["buffer", "--policy", "users_own_agent:hooked", "--method", "saliency"], "leave out method"),
    "no buffer": (["nowhere", *PLAIN, "--method", "saliency"], "nowhere is not there"),
    "no function": (["users_own_agent:row", *PLAIN, "--method", "saliency"], "has no function 'row'"),
    "no rows": (["buffer", *PLAIN, "--method", "saliency", "--rows", "3"], "START:STOP"),
    "too large a share": (["buffer", *PLAIN, "--method", "saliency", "--fraction", "2", "--out", "new"], "1 at most"),
    "no config": (["buffer", "--config", "none.json"], "is not a config in JSON"),
    "no YAML": (["buffer", "--config", "none.yaml"], "is no config in YAML"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_commands(kind: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[kind]
    assert main(["analyze", *arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not Path("new").exists()


def test_a_config_with_another_option(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (('{"fractions": 1}', "nearest: 'fraction'"), ("[1]", "no options by name"),
                          ('{"fraction": "a"}', "fraction is a number, got 'a'")):  # fmt: skip
        (tmp_path / "c.json").write_text(text)
        assert main(["analyze", "buffer", "--config", str(tmp_path / "c.json")]) == 1
        assert message in capsys.readouterr().err
