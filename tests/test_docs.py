"""Every docstring example and every README snippet runs."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tdhook_rl
from tdhook_rl import envs

ROOT = Path(__file__).parents[1]
MODULES = [
    info.name
    for package in (tdhook_rl, envs)
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


#: Of an extra, what the examples of a module need.
NEEDED = {
    "tdhook_rl.replay.columns": "pandas",
    "tdhook_rl.replay.parquet": "pyarrow",
    "tdhook_rl.adapters.sb3": "stable_baselines3",
    "tdhook_rl.adapters.sb3_callback": "stable_baselines3",
    "tdhook_rl.adapters.sb3_data": "stable_baselines3",
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason=f"{NEEDED[name]} is not installed: the examples of {name} need it")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_references_lead_somewhere(name: str) -> None:
    spec = importlib.util.find_spec(name)  # some modules are of an extra
    text = Path(spec.origin or "").read_text()
    for target in re.findall(r":(?:mod|class|func|meth|attr):`~?(tdhook_rl[\w.]*)`", text):
        assert pydoc.locate(target) is not None, target


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_snippets(index: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), {})


def test_the_first_snippet_is_short() -> None:
    assert BLOCKS
    assert len(BLOCKS[0].strip().splitlines()) <= 15


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_version_to_cite_is_the_one_that_is_installed() -> None:
    assert f"\nversion: {tdhook_rl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_importing_adds_next_to_nothing() -> None:
    code = (
        "import torchrl, sys; before = set(sys.modules); import tdhook_rl; "
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert added == ["tdhook_rl"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Salienci"):
        tdhook_rl.Salienci  # noqa: B018
    assert "Saliency" in dir(tdhook_rl)


def test_the_page_on_methods_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are one module, as a reader would write it: workers import the classes in it."""
    page = (ROOT / "docs" / "write_your_own_method.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "own_methods.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("own_methods")
    mark = module.test_conformance.pytestmark[0]
    for one in mark.args[1]:
        module.test_conformance(*one.values)
