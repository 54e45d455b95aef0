"""The layout shows the architecture: rooms import from those below them, and no modules import in circles."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tdhook_rl

PACKAGE = Path(tdhook_rl.__file__).parent
CONTRACTS = PACKAGE.parent / "pyproject.toml"
ROOT_MODULES = 12


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(CONTRACTS), "--no-cache"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "tdhook_rl", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    return tmp_path


def test_arrows_go_one_way() -> None:
    found = lint(PACKAGE.parent)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("where", "line", "word"),
    [
        (
            "sites/paths.py",
            "from tdhook_rl.calls.passes import Call",
            "tdhook_rl.sites.paths -> tdhook_rl.calls.passes",
        ),
        (
            "calls/bound.py",
            "if TYPE_CHECKING:\n    from tdhook_rl.calls.passes import Call",
            "No cycles are allowed in tdhook_rl.calls",
        ),
        (
            "latent/caches.py",
            "def draw():\n    from tdhook_rl.report.figures import overview",
            "tdhook_rl.latent.caches -> tdhook_rl.report.figures",
        ),
    ],
    ids=["an arrow that runs back", "a circle for type checking", "a result that draws itself"],
)
def test_the_contract_sees(copy: Path, where: str, line: str, word: str) -> None:
    file = copy / "tdhook_rl" / where
    file.write_text(f"{file.read_text()}\n{line}\n")
    found = lint(copy)
    assert found.returncode == 1
    assert word in found.stdout


def test_at_the_root_is_what_users_import() -> None:
    modules = [file.name for file in PACKAGE.glob("*.py") if file.name != "__init__.py"]
    assert len(modules) <= ROOT_MODULES, modules


def test_every_room_is_installed_and_says_what_it_is_for() -> None:
    import tomllib

    listed = set(tomllib.loads(CONTRACTS.read_text())["tool"]["setuptools"]["packages"])
    rooms = {
        ".".join(("tdhook_rl", *file.parent.relative_to(PACKAGE).parts)) for file in PACKAGE.rglob("__init__.py")
    } | {"tdhook_rl.envs"}
    assert rooms == listed
    for room in rooms:
        __import__(room)
        assert (sys.modules[room].__doc__ or "").strip(), room
