"""Three questions side by side: what it looks at, what it knows, and changing its mind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.bars import fill_bars, grouped_bars
from tdhook_rl.report.figures.probes import fill_probes, probe_curves
from tdhook_rl.report.figures.response import dose_curve, fill_doses
from tdhook_rl.report.figures.style import Curve, Number, array, beside, in_house_style


@in_house_style
def overview(
    features: Mapping[str, Mapping[str, Number]],
    concepts: Mapping[str, Mapping[str, Curve]],
    strengths: Sequence[float],
    response: Sequence[Number],
    *,
    behaviour: Mapping[str, Curve] | None = None,
    random: Any = None,
    matters: Collection[str] = (),
    chance: float | None = 0.5,
    units: tuple[str, str, str] = ("mean |attribution|", "held-out probe accuracy", "P(outcome)"),
    title: str = "What it looks at, what it knows, and changing its mind",
    of: str = "episodes",
    caption: str = "",
) -> Drawing:
    """Bars, probes and a dose-response in one row.

    Args:
        features, matters: as of :func:`grouped_bars`.
        concepts, behaviour, chance: as of :func:`probe_curves`; at most four concepts.
        strengths, response, random: as of :func:`dose_curve`.
        units: of the three.
        title, of, caption: as there.

    Example:
        >>> bars, curves = {"light": {"trained": 4.0, "untrained": 0.1}}, {"xor": {"trained": [(0, 0.5), (9, 0.9)]}}
        >>> overview(bars, curves, [0, 1], [0.0, 1.0]).alt.split(". ")[0]
        'mean |attribution|'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    drawings = [
        grouped_bars(features, unit=units[0], matters=matters, most=8, of=of),
        probe_curves(concepts, behaviour, chance=chance, unit=units[1], of=of),
        dose_curve(strengths, response, random=random, outcome=units[2], of=of),
    ]
    features = {name: features[name] for name in drawings[0].data["bars"]}
    concepts = {name: concepts[name] for name in drawings[1].data["concepts"]}
    entries = [
        fill_bars(axes[0], features, unit=units[0], matters=matters),
        fill_probes(axes[1], concepts, behaviour, chance=chance, unit=units[1], steps="environment frames"),
        fill_doses(axes[2], strengths, response, random=None if random is None else array(random)),
    ]
    axes[2].set(xlabel="alpha (in units of the vector)", ylabel=beside(units[2]))
    questions = ("What is it looking at?", "What does it know?", "Can I change its mind?")
    for axis, question, entry in zip(axes, questions, entries, strict=True):
        axis.set_title(question, fontsize=12, pad=8)
        axis.legend(
            list(entry.values()), list(entry), loc="upper center", bbox_to_anchor=(0.45, -0.16),
            ncols=2 if len(entry) > 3 else max(1, len(entry)), handlelength=2.4, columnspacing=1.2,
        )  # fmt: skip
    return Drawing(
        figure=figure,
        title=title,
        alt=" ".join(one.alt for one in drawings),
        data={"features": drawings[0].data, "concepts": drawings[1].data, "response": drawings[2].data},
        caption=" ".join(word for word in (caption, drawings[2].caption) if word),
    )
