"""Pictures, histograms, tables and names of any kind, as they may be logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from tdhook_rl.errors import InputError
from tdhook_rl.report import (
    Artifact,
    DataTable,
    FolderSink,
    Histogram,
    Image,
)
from tdhook_rl.report.frames import as_frames
from tdhook_rl.report.pictures import bars
from tdhook_rl.report.sinks.names import Tags

PICTURES: dict[str, tuple[Any, tuple[int, int]]] = {
    "grey": (np.zeros((5, 7)), (5, 7)),
    "channels first": (torch.rand(3, 5, 7), (5, 7)),
    "channels last": (np.zeros((5, 7, 3), np.uint8), (5, 7)),
    "one channel": (torch.rand(1, 5, 7), (5, 7)),
    "one channel last": (torch.zeros(5, 7, 1, dtype=torch.uint8), (5, 7)),
    "a stack of frames": (torch.zeros(4, 84, 84, dtype=torch.uint8), (84, 84)),
    "planes": (torch.zeros(6, 9, 8, dtype=torch.bool), (9, 8)),
    "three columns": (torch.rand(3, 64, 3), (64, 3)),
    "one pixel": (torch.rand(1, 1), (1, 1)),
    "a line": (np.zeros((1, 500)), (1, 500)),
    "normalised": (torch.randn(3, 8, 8), (8, 8)),
    "half precision": (torch.rand(3, 8, 8, dtype=torch.bfloat16), (8, 8)),
    "NaN": (torch.full((3, 8, 8), float("nan")), (8, 8)),
    "infinite": (torch.tensor([[0.0, float("inf")], [float("-inf"), 1.0]]), (2, 2)),
    "large integers": (torch.arange(16).reshape(4, 4) * 1000, (4, 4)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_any_kind(name: str, tmp_path: Path) -> None:
    pixels, shape = PICTURES[name]
    sink = FolderSink(tmp_path)
    sink.log({"map": Image(pixels)}, 1)
    sink.close()
    with Pillow.open(tmp_path / "media" / "map" / "000000001.png") as picture:
        assert (picture.height, picture.width) == shape


def test_numbers_become_the_brightness_that_they_mean() -> None:
    stack = torch.zeros(4, 84, 84, dtype=torch.uint8)
    stack[3] = 200
    assert as_frames(stack[None]).max() == as_frames(stack[None]).min() == 200  # the newest frame of a stack
    assert as_frames(torch.tensor([[[0.0, 0.5, 1.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[0.0, 128.0, 255.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[-2.0, 0.0, 2.0]]]))[0, 0, :, 0].tolist() == [0, 128, 255]
    assert as_frames(torch.tensor([[[True, False]]]))[0, 0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(3, 3, device="meta"),
        np.zeros(5),
        np.zeros((2, 3, 4, 5)),
        np.zeros((0, 4)),
        np.zeros((3, 3), complex),
        [[1], [1, 2]],
    ],
)
def test_what_is_no_picture_is_refused(odd: Any) -> None:
    with pytest.raises(InputError):
        Image(odd)


@pytest.mark.parametrize(
    "values", [[1.0], [1e30] * 9, [1.0, 1.0 + 1e-16], [-1e308, 1e308], [1e-320, 2e-320], [0.0, 3e38, float("inf")]]
)
def test_histograms_of_odd_ranges(values: list[float]) -> None:
    found = Histogram.of(torch.tensor(values, dtype=torch.double))
    assert int(found.counts.sum()) == sum(map(np.isfinite, values))
    assert bool(np.isfinite(found.edges).all())
    assert bool((np.diff(found.edges) > 0).all())


@pytest.mark.parametrize(
    "odd", [[1j, 2.0], torch.tensor([1j]), np.ma.array([1.0, 2.0], mask=[0, 1]), [[1], [1, 2]], ["a"],
            torch.zeros(3, device="meta")],
)  # fmt: skip
def test_values_that_have_no_histogram(odd: Any) -> None:
    with pytest.raises(InputError, match="the values of a histogram"):
        Histogram.of(odd)


@pytest.mark.parametrize(
    ("counts", "edges"),
    [([1, 2], [0, 1]), ([-1, 2], [0, 1, 2]), ([1, math.nan], [0, 1, 2]), ([1, 2], [2, 1, 0]), ([], [0]),
     ([1, 2], [0, 1, math.inf]), ([1, 2], [1, 1, 1]), ([[1, 2]], [0, 1, 2])],
)  # fmt: skip
def test_counts_and_edges_that_are_no_histogram(counts: Any, edges: Any) -> None:
    with pytest.raises(InputError, match="a histogram has"):
        Histogram(counts, edges)


def test_what_is_masked_is_black() -> None:
    shown = Image(np.ma.array([[1.0, 1.0], [0.5, 1.0]], mask=[[1, 0], [0, 0]])).pixels
    assert shown[..., 0].tolist() == [[0, 255], [128, 255]]


def test_media_that_cannot_be() -> None:
    assert DataTable(["file"], [["a\udc80"]]).content() == b"file\na\\udc80\n"
    with pytest.raises(InputError, match="needs a finite value"):
        Histogram.of([float("nan")])
    with pytest.raises(InputError, match="a row has 1 cells, and the table 2 columns"):
        DataTable(["a", "b"], [[1]])
    with pytest.raises(InputError, match=r"no\.such\.file is there"):
        Artifact(["no.such.file"])


def test_names_stay_apart() -> None:
    tags = Tags("interp", other=r"[^-\w.]")
    names = ["a b", "a_b", "a/b", "a.b", "step", "x" * 400, "x" * 401, "é" * 200]
    assert len({tags[name] for name in names}) == len(names)
    assert tags["step"] != "interp/step"
    assert all(len(tags[name].encode()) < 200 and tags[name].count("/") == 1 for name in names)


@pytest.mark.parametrize(
    ("one", "other"), [("\u0436\u0448", "\u044f\u043c"), ("\u03b1", "\u03b2"), ("\u00e9", "\u00fc")]
)
def test_letters_of_other_alphabets_are_written(one: str, other: str) -> None:
    """A font that lacks a letter shows the same box for all of them."""
    first, second = (bars([1.0, 0.5], [name, "b"], name) for name in (one, other))
    assert first.shape == second.shape
    assert (first != second).any()
