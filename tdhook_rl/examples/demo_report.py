"""What the demo shows at the end: a table, figures, and the report."""

from __future__ import annotations

from pathlib import Path

from tdhook_rl.examples.demo import CONCEPTS, Findings, Settings
from tdhook_rl.report import Figure, Table, write_report
from tdhook_rl.report.figures.earlier import attribution_bars, dose_curve, learning_curves, observation_maps, overview

__all__ = ["COLUMNS", "summary", "write"]

COLUMNS = ("question", "measured", "found", "expected", "met")
LIGHTS = ("light 1\n(needed)", "light 2\n(needed)", "light 3\n(never)", "light 4\n(never)")


def summary(found: Findings) -> list[tuple[str, str, str, str, str]]:
    """One row for each finding, with what is known of the environment beside it."""
    xor, unneeded = found.probes["xor"], found.probes["unneeded_xor"]
    other, control = float(found.response.of_vector("other")[-1]), float(found.response.best_control("other")[-1])
    checks = [
        ("did it learn?", "episodes that end in the paying corner", found.success, "at least 0.90",
         found.success >= 0.9),
        ("what does it look at?", "saliency, needed over other lights", found.saliency_ratio, "at least 4",
         found.saliency_ratio >= 4),
        ("what does it know?", f"probe of the needed XOR (untrained {xor['untrained']:.2f})", xor["trained"],
         "at least 0.95", xor["trained"] >= 0.95),
        ("what does it not keep?", f"probe of the unneeded XOR (untrained {unneeded['untrained']:.2f})",
         unneeded["trained"], "at most 0.70", unneeded["trained"] <= 0.70),
        ("can I change its mind?", "P(other corner) at alpha 1", other, "at least 0.93", other >= 0.93),
        ("is it this direction?", f"... minus the best of 8 random vectors ({control:.2f})", other - control,
         "at least 0.40", other - control >= 0.4),
    ]  # fmt: skip
    return [
        (question, measured, f"{value:.2f}", expected, "yes" if met else "no")
        for question, measured, value, expected, met in checks
    ]


def write(found: Findings, settings: Settings, folder: Path) -> Path:
    """Write the figures and ``report.html``; returns the path of the report."""
    figures = folder / "figures"
    curves = found.curves
    probes = {
        f"{name.replace('_', ' ')} ({role})": (curves[f"probe.{name}.trained"], curves[f"probe.{name}.untrained"])
        for name, role in CONCEPTS.items()
    }
    learning = learning_curves(figures / "learning.png", curves["success"], probes, "success")
    lights = {network: seen["lights"].tolist() for network, seen in found.saliency.items()}
    of_lights = dict(zip(LIGHTS, zip(lights["trained"], lights["untrained"], strict=True), strict=True))
    bars = attribution_bars(figures / "saliency_lights.png", of_lights, "mean |gradient| of the chosen logit")
    overview(figures / "overview.png", of_lights, probes, found.response, "other")
    maps = observation_maps(
        figures / "saliency_maps.png",
        found.saliency["trained"]["planes"],
        ("agent", "goals", "lights (row 1)"),
        "mean |gradient|",
    )
    dose = dose_curve(
        figures / "steering.png",
        found.response,
        "other",
        "cued",
        "alpha (in units of the vector)",
        "episodes that end in the corner",
    )
    text = (
        f"{settings.frames} frames, seed {settings.seed}, {settings.workers or 'no'} worker processes, "
        f"{found.seconds:.0f} s. The right answers are known because the environment was built so."
    )
    parts = [
        Table("Findings", COLUMNS, summary(found), text),
        Figure("What it knows, and when", learning,
               "Success of the agent as it trains, and how well two concepts can be read from its second hidden layer "
               "on held-out episodes and states. The dashed lines are the network before training: the concept that "
               "the task needs rises above it, the one that it does not need falls below."),
        Figure("What it looks at", bars,
               "Mean absolute gradient of the chosen action's logit with respect to each light. Only the first two "
               "lights decide which corner pays."),
        Figure("Where it looks", maps,
               "The same gradient for every cell of the three observation planes; the row of lights is on top."),
        Figure("Changing its mind", dose,
               f"Adding alpha times the difference vector of {found.vector.path} towards the corner that does not pay. "
               f"Each point is {found.response.episodes} episodes from the same starts with the same noise; random "
               "vectors have equal norm."),
    ]  # fmt: skip
    return write_report(
        folder / "report.html",
        "CueCorners: what the agent looks at, what it knows, and changing its mind",
        "A policy trained with tdhook_rl inside its TorchRL collector.",
        parts,
    )
