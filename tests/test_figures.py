"""Every figure of the reports, drawn from small results into a folder that is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdhook_rl.report import figures
from tdhook_rl.sweeps import DoseResponse

CURVE = [(0, 0.1), (100, 0.9)]
PROBES = {"xor": (CURVE, CURVE[::-1])}
BARS = {"needed": (0.5, 0.1), "unneeded": (0.1, 0.2)}
RATES = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))  # the vector, two random ones; two strengths
RESPONSE = DoseResponse(alphas=(0.0, 1.0), rates={"corner": RATES, "success": RATES}, episodes=8)

FIGURES: dict[str, Callable[[Path], Path]] = {
    "attribution_bars": lambda path: figures.attribution_bars(path, BARS, "mean |gradient|"),
    "dose_curve": lambda path: figures.dose_curve(path, RESPONSE, "corner", "success", "alpha", "rate"),
    "grouped_bars": lambda path: figures.grouped_bars(path, {"value": {"a": 1.0, "b": 0.5}}, "share"),
    "learning_curves": lambda path: figures.learning_curves(path, CURVE, PROBES, "success"),
    "observation_maps": lambda path: figures.observation_maps(path, torch.rand(2, 5, 5), ["agent", "goal"], "|attr|"),
    "overview": lambda path: figures.overview(path, BARS, PROBES, RESPONSE, "corner"),
    "series": lambda path: figures.series(path, [0, 1], {"a": [0.0, 1.0], "b": [1.0, 0.5]}, "step", "share"),
}


def test_every_figure_is_drawn_here() -> None:
    assert sorted(FIGURES) == sorted(figures.__all__)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_written(name: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = FIGURES[name](tmp_path / "new" / f"{name}.png")
    assert path == tmp_path / "new" / f"{name}.png"
    assert (imread(path)[..., :3] < 1).any(-1).mean() > 0.02  # it is no empty page
