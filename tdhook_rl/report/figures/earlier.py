"""Figures of a run: what was learnt when, what is looked at, and what steering does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tdhook_rl.sweeps import DoseResponse

__all__ = [
    "attribution_bars",
    "dose_curve",
    "grouped_bars",
    "learning_curves",
    "observation_maps",
    "overview",
    "series",
]

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9772b", "#3b8f5a", "#8a8f98"

Curve = Sequence[tuple[int, float]]


Bars = Mapping[str, tuple[float, float]]
Probes = Mapping[str, tuple[Curve, Curve]]


def overview(path: Path, bars: Bars, probes: Probes, response: DoseResponse, outcome: str) -> Path:
    """The three questions side by side: what it looks at, what it knows, and changing its mind."""
    figure, (left, middle, right) = _subplots(1, 3, figsize=(13, 3.4))
    _draw_bars(left, bars, "mean |gradient|")
    _draw_probes(middle, probes, "probe accuracy (held out)")
    _draw_dose(right, response, outcome)
    right.set(xlabel="alpha (in units of the vector)", ylabel="P(the other corner)")
    for axis, title in ((left, "What is it looking at?"), (middle, "What does it know?"), (right, "Can I change it?")):
        axis.set_title(title, fontsize=11)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return _save(figure, path)


def learning_curves(
    path: Path, behaviour: Curve, probes: Probes, behaviour_label: str, held_out: str = "episodes and states"
) -> Path:
    """Behaviour above, held-out probe accuracy below: the trained network solid, the untrained one dashed."""
    figure, (above, below) = _subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[1, 2])
    above.plot(*_columns(behaviour), color=GREEN)
    above.set(ylabel=behaviour_label, ylim=(-0.03, 1.03))
    _draw_probes(below, probes, f"probe accuracy\n(held-out {held_out})")
    below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8, frameon=False)
    return _save(figure, path)


def attribution_bars(path: Path, values: Bars, ylabel: str) -> Path:
    """For each feature the attribution in the trained and in the untrained network."""
    figure, axis = _subplots(figsize=(6, 3.2))
    _draw_bars(axis, values, ylabel)
    axis.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def grouped_bars(path: Path, groups: Mapping[str, Mapping[str, float]], ylabel: str) -> Path:
    """For each group one bar of each series, side by side."""
    names = list(next(iter(groups.values())))
    figure, axis = _subplots(figsize=(min(9.0, max(4.5, 0.45 * len(groups) * len(names))), 3.2))
    width = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, (BLUE, ORANGE, GREY, GREEN), strict=False)):
        offset = (place - (len(names) - 1) / 2) * width
        heights = [values[name] for values in groups.values()]
        axis.bar([group + offset for group in range(len(groups))], heights, width=width, color=colour, label=name)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(ylabel=ylabel)
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    return _save(figure, path)


def series(path: Path, x: Sequence[float], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Path:
    """Lines over one axis, of values between 0 and 1."""
    figure, axis = _subplots(figsize=(6, 3.4))
    for (name, values), colour in zip(lines.items(), (BLUE, GREY, ORANGE, GREEN), strict=False):
        axis.plot(list(x), list(values), color=colour, marker="o", markersize=3, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.03))
    axis.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _draw_probes(axis: Any, probes: Probes, ylabel: str) -> None:
    for (name, (trained, untrained)), colour in zip(probes.items(), (BLUE, ORANGE, GREY), strict=False):
        axis.plot(*_columns(trained), color=colour, label=f"{name}, trained")
        axis.plot(*_columns(untrained), color=colour, linestyle="--", linewidth=1, label=f"{name}, untrained")
    axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(ylabel=ylabel, xlabel="environment frames", ylim=(0, 1.03))


def _draw_bars(axis: Any, values: Bars, ylabel: str) -> None:
    names = list(values)
    places = range(len(names))
    axis.bar([p - 0.2 for p in places], [values[n][0] for n in names], width=0.4, color=BLUE, label="trained")
    axis.bar([p + 0.2 for p in places], [values[n][1] for n in names], width=0.4, color=GREY, label="untrained")
    axis.set_xticks(list(places), names)
    axis.set(ylabel=ylabel)


def dose_curve(path: Path, response: DoseResponse, outcome: str, competence: str, xlabel: str, ylabel: str) -> Path:
    """The rate of an outcome by alpha, the random vectors as a band, and what is left of competence."""
    figure, axis = _subplots(figsize=(6, 3.6))
    _draw_dose(axis, response, outcome)
    left = response.of_vector(competence).numpy()
    axis.plot(list(response.alphas), left, color=GREEN, linestyle="--", label=f"{competence} (vector)")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _draw_dose(axis: Any, response: DoseResponse, outcome: str) -> None:
    alphas = list(response.alphas)
    # matplotlib takes arrays: numpy's conversion of tensors warns.
    controls = response.rates[outcome][1:].numpy()
    axis.fill_between(
        alphas, controls.min(0), controls.max(0), color=GREY, alpha=0.35, linewidth=0, label="random vectors (range)"
    )
    axis.plot(alphas, controls.mean(0), color=GREY, linewidth=1, label="random vectors (mean)")
    axis.plot(alphas, response.of_vector(outcome).numpy(), color=BLUE, marker="o", label="steering vector")
    axis.set(ylim=(-0.03, 1.03))


def observation_maps(path: Path, planes: Tensor, titles: Sequence[str], label: str) -> Path:
    """One map for each plane of a grid observation, ``(planes, rows, columns)``, on one colour scale."""
    figure, axes = _subplots(1, len(titles), figsize=(2.6 * len(titles), 3.0), squeeze=False)
    for axis, plane, title in zip(axes[0], planes, titles, strict=True):
        image = axis.imshow(plane.numpy(), cmap="viridis", vmin=0, vmax=float(planes.max()))
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[0].tolist(), label=label, shrink=0.75)
    return _save(figure, path, tight=False)


def _subplots(*args: int, **kwargs: Any) -> Any:
    # The object interface keeps pyplot's global state, and a display, out of a training process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = kwargs.pop("figsize")
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    ratios = kwargs.pop("height_ratios", None)
    axes = figure.subplots(*args, **kwargs, gridspec_kw={"height_ratios": ratios} if ratios else None)
    for axis in [axes] if not hasattr(axes, "flat") else axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure, axes


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _save(figure: Any, path: Path, tight: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight" if tight else None)
    return path
