"""Every figure: what is drawn is what is beside it, names stay names, and nobody needs all three cones to read it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tdhook_rl.errors import InputError
from tdhook_rl.report import figures
from tdhook_rl.report.drawing import Drawing, plain
from tdhook_rl.statistics import Interval


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What imports pyplot in a training process takes over its figures, and perhaps its display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def interval(value: float, reach: float = 0.05, groups: int = 32) -> Interval:
    return Interval(
        estimate=value, low=value - reach, high=value + reach, confidence=0.95, method="t", groups=groups, rows=groups
    )


ODD = ("$x_1$ and $y$", "_hidden", "a < b & c > d", "ключ 鍵 🔑", "\x00two\nlines", "module.0." * 30)


def bars(names: Any, value: Callable[[int], Any]) -> Drawing:
    groups = {name: {"trained": value(at), "untrained": 0.1 * at} for at, name in enumerate(names)}
    return figures.grouped_bars(groups, unit="mean |gradient|", matters=list(names)[:1])


def curve(values: Any) -> list[tuple[int, Any]]:
    return [(100 * step, value) for step, value in enumerate(values)]


def probes(names: Any, values: Any) -> Drawing:
    return figures.probe_curves({name: {"trained": curve(values), "untrained": curve(values)} for name in names},
                                {"success": curve(values)})  # fmt: skip


NAN = float("nan")
#: By figure: from names and from values a drawing.
SHAPES: dict[str, Callable[[Any, Any], Drawing]] = {
    "grouped_bars": lambda names, values: bars(names, lambda at: values[at % len(values)]),
    "probe_curves": probes,
    "lines": lambda names, values: figures.lines({name: curve(values) for name in list(names)[:5]}, unit="share"),
    "dose_curve": lambda names, values: figures.dose_curve(
        range(len(values)), values, competence={next(iter(names)): values}, random=np.full((3, len(values)), 0.1)
    ),
    "seed_curves": lambda names, values: figures.seed_curves(
        {name: curve(values) for name in list(names)[:3]}, unit="share"
    ),
}
VALUES: dict[str, list[Any]] = {
    "one": [0.5],
    "many": list(np.linspace(0, 1, 300)),
    "none": [NAN, NAN],
    "gaps": [0.1, NAN, 0.3, NAN, float("inf"), 0.5, 0.6],
    "intervals": [interval(0.5), interval(0.9, NAN), 0.7, interval(NAN, NAN)],
    "large": [1e9, -3e12, 5.0],
    "small": [1e-12, 3e-12],
    "same": [0.25] * 3,
}
NAMES: dict[str, Any] = {
    "one": ["a"],
    "forty": [f"feature {number}" for number in range(40)],
    "thousand": [f"concept.{number}" for number in range(1000)],
    "odd": ODD,
}


def texts(svg: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("text")]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("names", "values"), [*(("one", one) for one in VALUES), *((one, "gaps") for one in NAMES)])
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


@pytest.mark.parametrize("name", SHAPES)
def test_names_stay_names(name: str) -> None:
    drawing = SHAPES[name](ODD, [0.5, 0.7])
    svg = drawing.svg()
    found = " ".join(texts(svg))
    shown = list(ODD)[: {"dose_curve": 1, "seed_curves": 3}.get(name, 4)]
    for one in shown:
        assert one in found, found
    assert "\x00" not in svg
    assert all(one in json.dumps(drawing.data, ensure_ascii=False) for one in shown)


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
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        drawing.save(tmp_path / "bars.pdf")


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
