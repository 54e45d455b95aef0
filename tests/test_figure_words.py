"""What is written in figures: names that differ are written apart, numbers are told apart, and text stays as it is."""

from __future__ import annotations

import html
import itertools
import math

import numpy as np
import pytest

from tdhook_rl.report import figures
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import style
from tdhook_rl.report.page import Page
from tests.drawings import SHAPES
from tests.test_figures import WRITTEN, texts

#: Names that are alike where they begin and end, as of the layers of a transformer, or of checkpoints.
ALIKE = [f"policy.encoder.blocks.{at}.attention.projection.weight.of.the.agent.at.the.end" for at in range(4)]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "overview"])
def test_names_that_differ_in_the_middle_are_written_apart(name: str) -> None:
    found = {text for text in texts(SHAPES[name](ALIKE, [0.5, 0.7]).svg()) if "…" in text or text in ALIKE}
    assert len(found) >= WRITTEN.get(name, 4), found


def test_series_are_told_from_what_is_drawn_beside_them() -> None:
    beside = {"truth": 0.5, "matters": 0.25, "found": 0.1}
    drawn = figures.grouped_bars({"a": beside}, unit="u", truth={"a": 0.4}, matters=["a"])
    assert {"truth", "truth (2)", "matters", "matters (2)", "found"} <= set(texts(drawn.svg()))


def test_what_a_name_looks_like_changes_nothing() -> None:
    odd = ["agent (#2)", 'is id="a"', "ink #1d232b", 'href="#a"']
    for name in ("grouped_bars", "value_grid"):
        drawing = SHAPES[name](odd, [0.5, 0.7])
        page = Page(title="t", parts=[drawing]).html()
        assert all(one in " ".join(texts(drawing.svg())) for one in odd)
        assert all(html.escape(one, quote=False) in page for one in odd)


@pytest.mark.parametrize(("start", "step"), [(0, 10_000), (1_000_000, 100), (100_000, 512)])
@pytest.mark.parametrize("name", ["lines", "network_health", "histograms_over_time"])
def test_ticks_are_where_they_say(name: str, start: int, step: int) -> None:
    at = [start + step * place for place in range(8)]
    curve = [(one, 0.1 * place) for place, one in enumerate(at)]
    drawing: Drawing = {
        "lines": lambda: figures.lines({"a": curve}, unit="u"),
        "network_health": lambda: figures.network_health({"dormant/a": curve, "norm/a": curve}),
        "histograms_over_time": lambda: figures.histograms_over_time(
            {"step": one, "counts": [1, 2], "edges": [1000.0, 1001.0, 1002.0]} for one in at
        ),
    }[name]()
    drawing.figure.draw_without_rendering()
    for axis in itertools.chain.from_iterable(
        (one.xaxis, one.yaxis) for one in drawing.figure.axes[: 1 + (name == "network_health")]
    ):
        places = [one for one in axis.get_majorticklocs() if min(axis.get_view_interval()) <= one]
        written = axis.get_major_formatter().format_ticks(places)
        assert len(set(written)) == len(places), written
        width = np.diff(places).min() if len(places) > 1 else math.inf
        assert all(abs(value_of(text) - place) <= 0.02 * width for text, place in zip(written, places, strict=True))


def value_of(text: str) -> float:
    """The number that is written."""
    text = text.replace("\N{MINUS SIGN}", "-")
    size = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    return float(text if size == 1 else text[:-1]) * size


def test_numbers_are_rounded_once() -> None:
    assert [style.number(one) for one in (999.7, 999_700, -999.9, 9.999, 999.4)] == ["1k", "1M", "-1k", "10", "999"]
    assert style.numbers([0.0, 0.5, 1.0]) == ["0", "0.5", "1"]
    assert style.numbers([float("nan")]) == ["not known"]


@pytest.mark.parametrize(("size", "rows", "columns"), [(1e-7, 5, 8), (0.0031, 2, 2), (0.05, 5, 3), (12.0, 5, 8)])
def test_numbers_of_a_grid_are_those_of_its_cells(size: float, rows: int, columns: int) -> None:
    values = -size * (1 + np.arange(rows * columns).reshape(rows, columns)) / (rows * columns)
    cells = {ALIKE[0] + f"{row}": dict(zip("abcdefgh", line, strict=False)) for row, line in enumerate(values)}
    drawing = figures.value_grid(cells, unit="u")
    axis = drawing.figure.axes[0]
    written = [one for one in axis.texts if one.get_text()]
    for text, value in zip(written, values.flat, strict=True):
        assert abs(value_of(text.get_text()) - value) <= 0.0501 * size
    drawing.figure.draw_without_rendering()
    boxes = [one.get_window_extent() for one in written]
    for left, right in itertools.pairwise(boxes[:columns]):
        assert left.x1 < right.x0
