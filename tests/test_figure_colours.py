"""Nobody needs all three cones, young eyes or a white page to read a figure."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.drawings import MEASURED, SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_drawn_can_be_read(name: str) -> None:
    from matplotlib.text import Text

    from tdhook_rl.report.figures.style import BAD, COLOURS

    drawing = SHAPES[name](["a", "b", "c"], MEASURED)
    sizes = {one.get_fontsize() for one in drawing.figure.findobj(Text) if one.get_text() and one.get_visible()}
    assert min(sizes) >= 9
    colours = {one.lower() for one in re.findall(r"#[0-9a-fA-F]{6}\b", drawing.svg())}
    shades = {"#d5dae1", BAD, *COLOURS}  # the first is the fallback of a page without a colour for grids
    assert colours - ramp() <= shades, colours - shades


def ramp() -> set[str]:
    """The colours of the bars that explain images: the page's below, so their strength is an opacity."""
    from matplotlib.colors import to_hex

    from tdhook_rl.report.figures.style import colour_map

    return {to_hex(colour_map(signed)(at)) for signed in (True, False) for at in range(255)}


#: Machado, Oliveira & Fernandes 2009 (IEEE TVCG 15), severity 1, on linear RGB.
MISSING = {
    "green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "none": np.eye(3).tolist(),
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def contrast(first: str, second: str) -> float:
    light, dark = sorted((float(linear(one) @ [0.2126, 0.7152, 0.0722]) for one in (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("missing", MISSING)
def test_colours_are_told_apart(missing: str) -> None:
    from tdhook_rl.report.figures.style import COLOURS

    seen = [lab(np.clip(np.array(MISSING[missing]) @ linear(one), 0, 1)) for one in COLOURS]
    apart = {(COLOURS[i], COLOURS[j]): float(np.linalg.norm(seen[i] - seen[j])) for i in range(5) for j in range(i)}
    assert min(apart.values()) > 20, apart  # two that a reader just tells apart are 2.3 apart


def test_colours_stand_out_from_the_page() -> None:
    from tdhook_rl.report.drawing import NIGHT, PAPER
    from tdhook_rl.report.figures.style import COLOURS

    found = {(one, page): contrast(one, page) for one in COLOURS for page in (PAPER, NIGHT)}
    assert min(found.values()) >= 3, found  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize("name", ["lines", "probe_curves", "dose_curve"])
def test_lines_differ_in_more_than_colour(name: str) -> None:
    drawing = SHAPES[name](["a", "b", "c", "d", "e"], MEASURED)
    for axis in drawing.figure.axes:
        looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.lines]
        assert len({look[1:] for look in looks}) == len(looks)
