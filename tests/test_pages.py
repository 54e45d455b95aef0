"""The pages of docs/: each block runs, prints what the page says, saves what it shows; nothing public is left out."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.error_page import PAGE, classes, messages, written
from tests.pages import DOCS, ROOT, alike, blocks, figures, pages, run

#: Pages that take longer than two seconds.
SLOW = {"adapters.md", "how_to/minigrid.md", "how_to/sb3.md", "how_to/wandb.md"}
#: What a page needs beside the library, by module and extra.
NEEDED = {
    "adapters.md": "stable_baselines3",
    "how_to/minigrid.md": "minigrid",
    "how_to/sb3.md": "stable_baselines3",
}
ALL = sorted(DOCS.rglob("*.md"))
NAMES = [page.relative_to(DOCS).as_posix() for page in ALL]
#: The rooms and modules that users import from.
PUBLIC = (
    "adapters", "artifacts", "attribution", "envs", "errors", "experiments", "latent", "latent.dimension_estimation",
    "latent.probing", "method", "metrics", "probes", "replay", "report", "report.figures", "rollout", "scheduled",
    "statistics", "sweeps", "targets", "testing", "weights",
)  # fmt: skip


def _programs() -> list[object]:
    names = [page.relative_to(DOCS).as_posix() for page in pages()]
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else (), id=name) for name in names]


@pytest.mark.parametrize("name", _programs())
def test_pages_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program, in an empty folder, from whatever seed: what is printed and shown does not hang on it."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason=f"the page {name} is about {NEEDED[name]}")
    page = DOCS / name
    monkeypatch.chdir(tmp_path)
    for block, printed in run(page):
        assert block.shown is None or alike(block.shown, printed, block.exact), f"{name}:{block.line} prints\n{printed}"
    for figure in figures(page):
        if figure != "overview.png":  # of the demo
            assert (tmp_path / figure).stat().st_size > 1000
            assert (page.parent / "figures" / figure).stat().st_size > 1000, "write it: python -m tests.pages"


def test_other_words_and_other_numbers_are_told() -> None:
    assert not alike("the cheese 0.3", "the agent 0.3")
    assert not alike("0.3 of 64", "0.3")
    assert not alike("accuracy 0.98 (0.95 to 1.00)", "accuracy 0.55 (0.52 to 0.58)")
    assert not alike("norm 12.0", "norm 20.0")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("how_to/")])
def test_a_how_to_is_short_and_says_how_far_to_trust_it(name: str) -> None:
    text = (DOCS / name).read_text()
    assert len(text.splitlines()) <= 150
    assert text.startswith("# ")
    assert "\n**In short:**" in text
    assert "\n## How far to trust it\n" in text
    assert "\n## What goes wrong\n" in text


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert ((DOCS / name).parent / target).exists(), target


def test_every_page_has_its_place() -> None:
    class Loader(yaml.SafeLoader):
        """Without the tags of extensions."""

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def listed(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in listed(part)]

    assert sorted(listed(nav)) == NAMES, "each page is in nav of mkdocs.yml, so that it can be found"


def _on_pages() -> list[str]:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)


def test_the_reference_shows_all_that_is_public() -> None:
    """Each class and function once, at one of its addresses; constants are left to the classes that take them."""
    listed = _on_pages()
    assert len(listed) == len(set(listed))
    found = {}
    for name in listed:
        home, _, short = name.rpartition(".")
        found[id(_there(home, short))] = name
    assert len(found) == len(listed), "something is listed twice"
    missing = []
    for home in PUBLIC:
        for name in importlib.import_module(f"tdhook_rl.{home}").__all__:
            one = _there(f"tdhook_rl.{home}", name)
            missing += [f"{home}.{name}"] if callable(one) and id(one) not in found else []
    assert missing == []


@functools.cache
def _there(home: str, name: str) -> object:
    """Something public; what belongs to a library that is not installed is known by its name."""
    try:
        return getattr(importlib.import_module(home), name)
    except ImportError:
        return lambda: name


def test_every_room_for_users_is_in_the_reference() -> None:
    """What docs and README import from is held above."""
    text = "\n".join(block.code for page in pages() for block in blocks(page)) + (ROOT / "README.md").read_text()
    used = set(re.findall(r"^from tdhook_rl\.([\w.]+) import", text, flags=re.MULTILINE))
    assert used - {f"{one}" for one in PUBLIC} <= {
        "examples.agent", "examples.minigrid", "examples.steer_at_eval", "envs.minigrid_labels", "report.probe_grids",
        "sweeps.causal",
    }  # fmt: skip


def test_every_error_is_on_its_page_with_a_remedy() -> None:
    assert written() in PAGE.read_text(), "write it: python -m tests.error_page"
    assert {one.__name__ for one in classes()} == set(re.findall(r"^## `(\w+)`$", PAGE.read_text(), re.MULTILINE))
    for error in classes():
        assert "What to do: " in (error.__doc__ or ""), error


def test_messages_are_read_from_the_source() -> None:
    found = messages()
    said = found["SiteError"]["tdhook_rl.sites"]
    assert any(text.startswith("no submodule of {") and "matches {" in text for text in said)
    assert sum(len(texts) for rooms in found.values() for texts in rooms.values()) > 800
    assert not [text for rooms in found.values() for texts in rooms.values() for text in texts if "\n" in text]


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'tdhook_rl[docs]'")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(NAMES)
    for page in built:
        text = page.read_text()
        asked = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:)?//", text)
        asked += re.findall(r"<link[^>]+href=\"?https?://[^>]+rel=\"?(?:stylesheet|preconnect)", text)
        assert not asked, page
