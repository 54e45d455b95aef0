"""What lies where a file is written before it takes its place: what a kill left, a pipe, a link to another file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdhook_rl import LinearProbe
from tdhook_rl.files.durable import write_text

#: What hangs is an error.
pytestmark = pytest.mark.limit(10)


def _page(folder: Path) -> None:
    write_text(folder / "file", "whole")
    assert (folder / "file").read_text() == "whole"


def _artifact(folder: Path) -> None:
    probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), path="1")
    assert torch.equal(LinearProbe.load(probe.save(folder / "file")).weight, probe.weight)


WRITERS = {"file.new": _page, "file.safetensors.new": _artifact, "file.json.new": _artifact}
LEFT: dict[str, Callable[[Path, Path], object]] = {
    "half a file": lambda place, other: place.write_text("ha"),
    "a pipe": lambda place, other: os.mkfifo(place),
    "a link": lambda place, other: place.symlink_to(other),
    "a second name": lambda place, other: os.link(other, place),
    "a link to nothing": lambda place, other: place.symlink_to(other.parent / "nothing"),
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("name", WRITERS)
def test_what_lies_in_the_way_is_taken_away(name: str, left: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("not ours")
    LEFT[left](tmp_path / name, other)
    WRITERS[name](tmp_path)
    assert other.read_text() == "not ours"
    assert not (tmp_path / "nothing").exists()
    assert not os.path.lexists(tmp_path / name)
