"""What the demo shows at the end: a table, figures, and the report."""

from __future__ import annotations

from pathlib import Path

from tdhook_rl.examples.demo import CONCEPTS, Findings, Settings
from tdhook_rl.report import Table, write_report
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import attribution_maps, dose_curve, grouped_bars, overview, probe_curves

__all__ = ["COLUMNS", "summary", "write"]

COLUMNS = ("question", "measured", "found", "expected", "met")
NEEDED = ("light 1", "light 2")


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
    text = (
        f"{settings.frames} frames, seed {settings.seed}, {settings.workers or 'no'} worker processes, "
        f"{found.seconds:.0f} s. The right answers are known because the environment was built so."
    )
    shown = drawings(found)
    for name, drawing in shown.items():
        drawing.save(folder / "figures" / f"{name}.png")
    parts = [Table("Findings", COLUMNS, summary(found), text)]
    parts += [drawing for name, drawing in shown.items() if name != "overview"]
    return write_report(
        folder / "report.html",
        "CueCorners: what the agent looks at, what it knows, and changing its mind",
        "A policy trained with tdhook_rl inside its TorchRL collector.",
        parts,
    )


def drawings(found: Findings) -> dict[str, Drawing]:
    """The figures by name."""
    curves, response = found.curves, found.response
    concepts = {
        f"{name} ({role})": {network: curves[f"probe.{name}.{network}"] for network in ("trained", "untrained")}
        for name, role in CONCEPTS.items()
    }
    seen = {network: one["lights"].tolist() for network, one in found.saliency.items()}
    lights = {f"light {light + 1}": {network: seen[network][light] for network in seen} for light in range(4)}
    other = response.intervals("other")
    steered = {"random": response.rates["other"][1:], "outcome": "P(the other corner)"}
    return {
        "learning": probe_curves(
            concepts,
            {"success": curves["success"]},
            of="episodes",
            caption="Success of the agent as it trains, and how well two concepts can be read from its second hidden "
            "layer, in states of the day, on held-out episodes and states; dashed, from the network before training.",
        ),
        "saliency_lights": grouped_bars(
            lights,
            unit="mean |gradient| of the chosen logit",
            title="What it looks at",
            matters=NEEDED,
            caption="Only the first two lights decide which corner pays.",
        ),
        "saliency_maps": attribution_maps(
            found.saliency["trained"]["planes"],
            ("agent", "goals", "lights (row 1)"),
            unit="mean |gradient|",
            caption="The same gradient for every cell of the three planes of the observation.",
        ),
        "steering": dose_curve(
            response.alphas,
            other,
            competence={"the corner that pays": response.intervals("cued")},
            caption=f"Adding alpha times the difference vector of {found.vector.path} towards the corner that does not "
            "pay, in episodes from the same starts with the same noise; random vectors have equal norm.",
            **steered,
        ),
        "overview": overview(
            lights,
            concepts,
            response.alphas,
            other,
            random=steered["random"],
            matters=NEEDED,
            units=("mean |gradient| of the chosen logit", "held-out probe accuracy", "P(the other corner)"),
        ),
    }
