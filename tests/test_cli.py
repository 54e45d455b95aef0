"""The command line of the doctor."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdhook_rl
from tdhook_rl.cli import main, program
from tdhook_rl.errors import ArtifactError
from tdhook_rl.latent import SteeringVector
from tdhook_rl.report import Page

SOURCE = """
from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor

def good():
    return ActivationCaching(FC2).prepare(make_actor(), return_context=False), CueCorners(batch_size=[2])

def untied():
    actor = make_actor()
    policy = ActivationCaching(FC2).prepare(actor, return_context=False)
    actor.double()
    return policy, CueCorners(batch_size=[2])

def several():
    return good()[0], [lambda: CueCorners(batch_size=[2])] * 2

def none_of_several():
    return good()[0], []

def nothing():
    return None

def no_environment():
    return good()[0], None

def no_arguments():
    return *good(), [64]
"""


@pytest.fixture(autouse=True)
def _a_module_of_the_users(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "users_own_setup.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_example_and_a_users_policy_pass(capsys) -> None:
    assert main(["check"]) == 0
    assert main(["check", "users_own_setup:good"]) == 0
    shown = capsys.readouterr().out
    assert "0 errors" in shown
    assert "tie" in shown


@pytest.mark.parametrize("command", [["sites"], ["play", "--episodes", "1", "--steps", "3"]])
def test_a_set_up_for_workers_has_an_environment(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], "users_own_setup:several", *command[1:]]) == 0
    assert main([command[0], "users_own_setup:none_of_several", *command[1:]]) == 1
    assert "no environment" in capsys.readouterr().err


def test_the_version(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tdhook-rl {tdhook_rl.__version__}\n"


def test_the_program_starts_without_torch() -> None:
    """So that Ctrl-C ends it in one line while packages are imported, and help comes at once."""
    asked = "import sys, tdhook_rl.cli; print(sorted({'torch', 'tensordict', 'numpy'} & set(sys.modules)))"
    home = Path(tdhook_rl.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=home)
    assert found.stdout == "[]\n"


def test_a_file_beside_no_run_is_called_a_file(capsys, tmp_path: Path) -> None:
    assert main(["report", str(tmp_path / "users_own_setup.py")]) == 1
    assert "users_own_setup.py is a file, and its folder" in capsys.readouterr().err


def test_a_broken_set_up_fails_with_the_remedy(capsys) -> None:
    assert main(["check", "users_own_setup:untied"]) == 1
    assert "error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("users_own_setup", "names no function"),
        ("users_own_setup:godo", "nearest: 'good'"),
        ("no_such_module:make", "no module is named 'no_such_module'"),
        ("users_own_setup:nothing", "must return"),
        (":good", "':good' names no function"),
        ("../users_own_setup:good", "names no function: write MODULE:FUNCTION"),
        ("users_own_setup:", "names no function"),
        ("users_own_setup.py:good", ""),
    ],
)
def test_bad_sources_say_so(source: str, message: str, capsys) -> None:
    assert main(["check", source]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["experiment", "probing"]])
@pytest.mark.parametrize("seed", ["-1", str(2**32), "9" * 30, "a", "1.5", ""])
def test_what_is_no_seed(command: list[str], seed: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, f"--seed={seed}"])
    assert ended.value.code == 2
    assert f"a seed is an integer from 0 to {2**32 - 1}, got {seed!r}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1,1", "-1e-3", "-.5,-.25", "-100:", "-inf", "-2"])
@pytest.mark.parametrize("option", ["steer --alphas", "analyze b --rows", "play --vector", "report r --out"])
def test_values_may_begin_with_a_minus(option: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *command, flag = option.split()
    seen: list[argparse.Namespace] = []
    for one in program.COMMANDS:  # which say what to run when the parsers are made
        monkeypatch.setattr(one, "run", lambda options: seen.append(options) or 0)
    assert main([*command, flag, value]) == 0
    assert str(getattr(seen[0], flag.removeprefix("--"))) == value


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    code = "import sys; from tdhook_rl.cli import main; assert [main(sys.argv[1:3]), main(sys.argv[3:])] == [0, 1]"
    done = subprocess.run(
        [sys.executable, "-c", code, "sites", "users_own_setup:good", "check", "users_own_setup:gd\u00f6"],
        capture_output=True, cwd=tmp_path, env={**os.environ, **plain}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    for text in (done.stdout, done.stderr):
        assert text
        assert text.isascii()


ODD_SET_UPS = {
    ("users_own_setup.py:good",): "users_own_setup.py is a file: write the module .* 'users_own_setup:good'",
    ("users_own_setup:no_environment",): "returned None for an environment: return one, or a function that makes one",
    ("users_own_setup:no_arguments",): r"returned \[64\] third: return the collector's arguments by name, a dict",
    ("users_own_setup:good", "--workers", "-1"): "num_workers= is a number of processes from 0 on, got -1",
}


@pytest.mark.parametrize("arguments", ODD_SET_UPS, ids=" ".join)
def test_what_a_set_up_may_not_be(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "play") if len(arguments) == 1 else ("check",):
        assert main([command, *arguments]) == 1
        assert re.search(ODD_SET_UPS[arguments], capsys.readouterr().err)


@pytest.mark.parametrize("given", ["x=a x=b", "=a", "x=", "a a"])
def test_concepts_and_checkpoints_have_a_name_each(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("concepts", "checkpoints"):
        others = ["--concepts", "b"] if what == "checkpoints" else []
        assert main(["probe", "nowhere", "--sites", "0", *others, f"--{what}", *given.split()]) == 1
        assert re.search(rf"--{what} (NAME|are named NAME)", capsys.readouterr().err)


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_whoever_reads_may_stop_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `head` does: no traceback, and the status of what a signal would have ended."""
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["sites"]) == 141


@pytest.mark.parametrize("path", ["", ".", "/", "here/..", "n" * 300, "here/" * 2000 + "n", "n\0n"])
def test_a_path_that_names_no_file(path: str) -> None:
    vector = SteeringVector(vector=torch.zeros(2), path="0")
    for use in (vector.save, SteeringVector.load, Page(title="a page").save):
        with pytest.raises(
            ArtifactError, match=r"names a folder, and no file in it|no file can be at|[Dd]irectory|there is"
        ):
            use(path)
