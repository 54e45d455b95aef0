"""Every figure: what is drawn is what is beside it, names stay names, and nobody needs all three cones to read it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tdhook_rl.errors import InputError
from tdhook_rl.report import figures
from tdhook_rl.report.drawing import as_drawn, plain
from tests.drawings import MEASURED, NAMES, NAN, ODD, SHAPES, VALUES, interval


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What imports pyplot in a training process takes over its figures, and perhaps its display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def texts(svg: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text")]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "overview"])  # whose parts they are
@pytest.mark.parametrize(("names", "values"), [*(("one", one) for one in VALUES), ("thousand", "gaps")])
def test_every_figure_takes_all_data(name: str, names: str, values: str) -> None:
    drawing = SHAPES[name](NAMES[names], VALUES[values])
    json.dumps(drawing.data, allow_nan=False)
    assert drawing.title
    assert drawing.alt
    assert len(drawing.alt) < 6000
    assert "nan" not in drawing.alt.lower()
    found = texts(drawing.svg())
    assert any(text.strip() for text in found)
    assert "nan" not in " ".join(found).lower()


#: How many of the odd names are written in a figure.
WRITTEN = {
    "dose_curve": 1,
    "histograms_over_time": 1,
    "attribution_maps": 4,
    "overlays": 4,
    "probe_curves": 4,
    "seed_curves": 3,
}


@pytest.mark.parametrize("name", SHAPES)
def test_names_stay_names(name: str) -> None:
    drawing = SHAPES[name](ODD, [0.5, 0.7])
    svg = drawing.svg()
    found = " ".join(texts(svg))
    for one in ODD[: WRITTEN.get(name, 4)]:
        assert one in found, found
    assert "\x00" not in svg
    kept = json.dumps(drawing.data, ensure_ascii=False)
    assert all(json.dumps(one, ensure_ascii=False)[1:-1] in kept for one in ODD[: WRITTEN.get(name, 4)])


def drawn(figure: Any) -> list[np.ndarray]:
    """The numbers that artists hold: lines, bars, images, fields, dots, bands."""
    found = []
    for axis in figure.axes:
        found += [np.ma.filled(np.ma.asarray(line.get_ydata(), dtype=float), np.nan) for line in axis.lines]
        found += [np.array([get(one) for one in bars]) for bars in axis.containers if hasattr(bars, "patches")
                  for get in (lambda one: one.get_width(), lambda one: one.get_height())]  # fmt: skip
        found += [np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan) for image in axis.images]
        for one in axis.collections:
            if one.get_array() is not None:
                found.append(np.asarray(one.get_array()))
            found += [path.vertices[:, at] for path in one.get_paths() for at in (0, 1)]
            found += [np.asarray(one.get_offsets())[:, at] for at in (0, 1)]
    return found


def kept(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The lists of numbers beside a figure, each with where it is."""
    for key, value in data.items() if isinstance(data, dict) else ():
        if isinstance(value, dict):
            yield from ((f"{key} {below}", one) for below, one in kept(value))
        elif isinstance(value, list) and value and not any(isinstance(one, str | dict) for one in value):
            yield key, np.array(value, dtype=float)
        elif isinstance(value, list) and key in ("response", "a"):
            yield key, np.array([one["estimate"] if isinstance(one, dict) else one for one in value], dtype=float)


def is_among(one: np.ndarray, artists: list[np.ndarray], whole: bool) -> bool:
    """Whether an artist holds these numbers; or else whether each is in one of them."""
    if whole:
        return any(one.shape == other.shape and np.allclose(one, other, rtol=1e-3, equal_nan=True) for other in artists)
    everything = np.concatenate([other.ravel() for other in artists])
    return all(np.isclose(everything, value, rtol=1e-3).any() for value in one.ravel() if value == value)


#: What is drawn in another way than it is kept: a square root, a transposed picture.
AS_DRAWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shares": lambda one: np.sqrt(one.T),
    "attribution": lambda one: one.T,
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "overview"])
def test_what_is_beside_a_figure_is_what_was_drawn(name: str) -> None:
    drawing = SHAPES[name](["a", "b", "c"], MEASURED)
    artists = drawn(drawing.figure)
    compared = 0
    for where, numbers_of in kept(drawing.data):
        key = where.split()[-1]
        if key in ("edges", "x", "step", "strengths", "chance"):
            continue
        expected = AS_DRAWN.get(key, lambda one: one)(numbers_of)
        parts = list(expected) if key in ("values", "random", "shuffled") else [expected]
        # Limits are edges of a band, whose path goes there and back; rewards and actions are of bars and dots.
        whole = key not in ("low", "high", "random", "shuffled")
        assert all(is_among(part, artists, whole) for part in parts), where
        compared += 1
    if name == "grouped_bars":
        bars_of = drawing.data["bars"]
        for series in ("trained", "untrained"):
            values = [bars_of[one][series] for one in bars_of]
            expected = np.array([one["estimate"] if isinstance(one, dict) else one for one in values])
            assert is_among(expected, artists, True)
        compared += 1
    assert compared


# ------------------------------------------------------------------ maps


def test_one_outlier_does_not_blank_the_rest() -> None:
    small = np.full((3, 40, 40), 0.001)
    small[0, 5, 5] = 0.5
    found = figures.attribution_maps(small)
    assert found.data["scale"] == pytest.approx(0.001)
    (first, *_) = found.figure.axes[0].images
    assert first.cmap(first.norm(0.001))[3] == pytest.approx(1, abs=0.01)  # not the page's colour
    scales = {image.get_clim() for axis in found.figure.axes[:3] for image in axis.images}
    assert len(scales) == 1


@pytest.mark.parametrize("shape", [(2, 3, 12, 10), (2, 12, 10, 3), (2, 4, 12, 10), (2, 12, 10)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_overlays_take_frames_of_all_kinds(shape: tuple[int, ...], kind: Any) -> None:
    frames = (np.linspace(0, 1, np.prod(shape)).reshape(shape) * (255 if kind is np.uint8 else 1)).astype(kind)
    attribution = np.zeros(shape, np.float32)
    place = np.unravel_index(77, shape)
    attribution[place] = -0.003
    found = figures.overlays(frames, attribution)
    peak = found.data["peaks"][0]
    rows = [axis for axis in range(1, len(shape)) if shape[axis] == 12]
    assert peak["largest"] == pytest.approx(-0.003)
    assert peak["row"] == place[rows[0]]


def test_wrong_data_is_said() -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: figures.grouped_bars({}, unit="x"), "no bars"),
        (lambda: figures.grouped_bars({"a": dict.fromkeys("abcdef", 1.0)}, unit="x"), "at most 5"),
        (lambda: figures.grouped_bars({"a": {"x": 1.0}}, unit="x", matters=["b"]), "'b'"),
        (lambda: figures.probe_curves({}), "got none"),
        (lambda: figures.probe_curves({"a": {"trainde": []}}), "'trainde'"),
        (lambda: figures.probe_curves({"a": {"trained": [(1, 2, 3)]}}), r"\(step, value, low, high\)"),
        (lambda: figures.lines({}, unit="x"), "got 0"),
        (lambda: figures.dose_curve([0, 1], [0.5]), "2 strengths and 1 rates"),
        (lambda: figures.attribution_maps(np.zeros(3)), r"\(3,\)"),
        (lambda: figures.attribution_maps(np.zeros((2, 3, 3)), ["a"]), "2 pictures and 1 titles"),
        (lambda: figures.overlays(np.zeros((1, 8, 8)), np.zeros((2, 8, 8))), "1 frames and 2"),
        (lambda: figures.histograms_over_time([]), "no histogram"),
        (lambda: figures.histograms_over_time([{"step": 0, "counts": [1], "edges": [0]}]), "1 and 1"),
        (lambda: figures.network_health({"loss": []}), "none of the 1 curves"),
        (lambda: figures.attribution_through_episode(np.zeros((3, 2)), rewards=[1.0]), "3 steps, and reward 1"),
        (lambda: figures.attribution_through_episode(np.zeros((3, 2)), ["a"]), "2 features and 1 names"),
    ]
    for call, words in wrong:
        with pytest.raises(InputError, match=words):
            call()


def test_every_figure_is_tried_here() -> None:
    assert sorted(SHAPES) == sorted(figures.__all__)


# ------------------------------------------------------------------ the file, the page


def test_a_figure_is_saved_with_its_data(tmp_path: Path) -> None:
    from matplotlib.image import imread

    drawing = SHAPES["grouped_bars"](["a", "b"], [interval(0.5)])
    path = drawing.save(tmp_path / "new" / "bars.png")
    assert (imread(path)[..., :3] < 1).any(-1).mean() > 0.02  # it is no empty page
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside["data"] == drawing.data
    assert beside["alt"] == drawing.alt
    assert drawing.save(tmp_path / "bars.svg").read_text() == drawing.svg()
    drawing.caption = "<b> & more"
    assert drawing.svg() in drawing._repr_html_()  # what a notebook shows
    assert "&lt;b&gt; &amp; more" in drawing._repr_html_()
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        drawing.save(tmp_path / "bars.pdf")


def test_a_saved_figure_is_a_drawing_again_and_nothing_else_is() -> None:
    for name in ("overlays", "network_health", "grouped_bars"):  # with images, lines and bars
        svg = SHAPES[name](["a"], [0.1, 0.2]).svg()
        assert as_drawn(svg.encode()) == svg
    for other in (
        svg.replace("</svg>", "<script>alert(1)</script></svg>"),
        svg.replace("<path", "<path onload='alert(1)'", 1),
        svg.replace("<g>", "<foreignObject>", 1),
        svg.replace("<g>", '<a href="javascript:alert(1)">', 1),
        svg.replace('role="img" ', "", 1),
    ):
        assert other != svg
        assert as_drawn(other.encode()) is None


def test_figures_share_no_ids_and_no_styles() -> None:
    drawings = [SHAPES["lines"](["a"], values) for values in ([0.1, 0.2], [0.1, 0.3])]
    ids = [set(re.findall(r' id="([^"]+)"', one.svg())) for one in drawings]
    assert all(ids)
    assert not ids[0] & ids[1]
    for one, own in zip(drawings, ids, strict=True):
        svg = one.svg()
        assert set(re.findall(r'[("]#([^")]+)', svg)) == own  # every reference is met in its own figure
        assert "<style" not in svg
        assert svg == one.svg()


def test_a_users_settings_change_nothing_and_stay() -> None:
    import matplotlib

    expected = SHAPES["lines"](["a_$b$"], [0.1, 0.2]).svg()
    mine = {"font.size": 30, "text.parse_math": True, "axes.facecolor": "black", "svg.fonttype": "path"}
    with matplotlib.rc_context(mine):
        assert SHAPES["lines"](["a_$b$"], [0.1, 0.2]).svg() == expected
        assert all(matplotlib.rcParams[key] == value for key, value in mine.items())


def test_plain_takes_what_results_are() -> None:
    import torch

    found = plain({"tensor": torch.tensor([1.0, NAN]), "interval": interval(0.5), "path": Path("a"), 3: {1}})
    assert found["tensor"] == [1.0, None]
    assert found["interval"]["groups"] == 32
    assert (found["path"], found["3"]) == ("a", [1])


@pytest.mark.parametrize("seed", range(8))
def test_quantiles_of_histograms_lie_where_the_values_do(seed: int) -> None:
    """By hand: values spread evenly within each bin. Half of the bins are empty, between others and at the ends."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 9, 12) * (draw.random(12) < 0.5)
    counts[draw.integers(12)] += 5
    edges = np.cumsum(draw.random(13)) - 3
    values = np.concatenate([
        low + (np.arange(2000 * count) + 0.5) / (2000 * count) * (high - low)
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ])  # fmt: skip
    found = figures.histograms_over_time([{"step": 1, "counts": counts, "edges": edges}]).data
    for name, share in (("5%", 0.05), ("median", 0.5), ("95%", 0.95)):
        assert found[name] == [pytest.approx(np.quantile(values, share, method="inverted_cdf"), abs=2e-3)]


def counting(shape: str, count: int) -> Any:
    return SHAPES[shape](["a"], [0.5] * count).figure


@pytest.mark.parametrize("shape", ["seed_curves", "network_health", "attribution_through_episode", "probe_curves",
                                   "lines", "overview"])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_counted_has_whole_ticks(shape: str, count: int) -> None:
    figure = counting(shape, count)
    figure.draw_without_rendering()
    for axis in figure.axes:
        if axis.get_xlabel() in ("environment frames", "step"):
            low, high = axis.get_xlim()
            ticks = [one for one in axis.get_xticks() if low <= one <= high]
            assert ticks
            assert all(float(one).is_integer() for one in ticks)


@pytest.mark.parametrize("shape", ["seed_curves", "network_health", "probe_curves", "lines", "overview"])
def test_a_panel_without_anything_says_so(shape: str) -> None:
    for values, empty in (([float("nan")] * 3, True), ([0.1, float("nan"), 0.3], False)):
        try:
            figure = SHAPES[shape](["a"], values).figure
        except InputError:
            assert empty  # there is nothing to draw at all
            continue
        told = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert ("nothing is known" in told) == empty


@pytest.mark.parametrize("values", [[-0.5, 0.25], [-3e12, 1e9], [-0.00012, 0.0001], [-123456.0, -1.0], [0.5, 1e-12]])
def test_numbers_of_bars_do_not_lie_on_names(values: list[float]) -> None:
    drawing = figures.grouped_bars({f"name {at}": {"x": value} for at, value in enumerate(values)}, unit="u")
    drawing.figure.draw_without_rendering()
    (axis,) = drawing.figure.axes
    names = max(one.get_window_extent().x1 for one in axis.get_yticklabels())
    assert min(one.get_window_extent().x0 for one in axis.texts) > names


LONG = "a unit of many words that would go on through the legend and beyond the page if nobody cut it"
OF_UNITS: dict[str, Callable[[], Any]] = {
    "lines": lambda: figures.lines({name: [(0, 1), (1, 2)] for name in ("a", "b")}, unit=LONG),
    "seeds": lambda: figures.seed_curves({"a": [(0, 1), (1, 2)]}, unit=LONG),
    "bars": lambda: figures.grouped_bars({"a": {"x": 0.5, "y": 0.2}}, unit=LONG),
    "histograms": lambda: figures.histograms_over_time([{"step": 1, "counts": [1], "edges": [0, 1]}], unit=LONG),
    "doses": lambda: figures.dose_curve([0, 1], [0.1, 0.9], random=[[0.1, 0.1]], outcome=LONG),
    "grid": lambda: figures.value_grid({"a": {"x": 0.5, "y": 0.2}}, unit=LONG),
    "maps": lambda: figures.attribution_maps(np.ones((2, 4, 4)), ["a", "b"], unit=LONG),
}


@pytest.mark.parametrize("name", OF_UNITS)
def test_a_long_unit_stays_on_the_page_and_out_of_the_legend(name: str) -> None:
    figure = OF_UNITS[name]().figure
    figure.draw_without_rendering()
    for axis in figure.axes:
        for text in (axis.xaxis.label, axis.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or (box.y0 > -2 and box.y1 < figure.bbox.y1 + 2 and box.x1 < figure.bbox.x1 + 2)
            assert not any(text.get_text() and box.overlaps(one.get_window_extent()) for one in figure.legends)


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (1, 1), (3, 8)])
def test_maps_of_one_row_can_be_seen(shape: tuple[int, int]) -> None:
    figure = figures.attribution_maps(np.ones((2, *shape)), ["a", "b"]).figure
    figure.draw_without_rendering()
    for axis in figure.axes[:2]:
        box = axis.get_window_extent()
        assert min(box.width, box.height) > 10
