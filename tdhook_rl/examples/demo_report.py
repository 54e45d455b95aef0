"""What the demo shows at the end: a table, figures, and the report."""

from __future__ import annotations

import math
from pathlib import Path

from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.demo import Findings, Settings
from tdhook_rl.report import Finding, page_of, save_findings
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import (
    attribution_maps,
    attribution_through_episode,
    dose_curve,
    grouped_bars,
    overview,
    probe_curves,
)
from tdhook_rl.report.figures.style import Number
from tdhook_rl.statistics import Interval

COLUMNS = ("question", "measured", "found", "beside it", "expected", "met")
LIGHTS = [CueCorners.feature_names[at] for at in CueCorners.light_features()]
CALLED = {"xor": "xor (needed)", "unneeded_xor": "other xor (not needed)"}
NEEDED = LIGHTS[:2]
GRADIENT = "mean |gradient| of the chosen logit"


def answers(found: Findings) -> list[Finding]:
    """Each finding with its interval, its controls, and what is known of the environment."""
    response = found.response
    other, control = response.response("other"), float(response.control_response("other")[:, -1].max())
    ratio = sum(map(float, found.lights["untrained"][:2])) / sum(map(float, found.lights["untrained"][2:]))
    ends = {name: (curve[-1][1], curve[0][1]) for name, curve in found.known.items()}
    return [
        _finding("Did it learn?", "episodes that end in the paying corner", found.success, {}, low=0.9),
        _finding("What does it look at?", "gradient of the needed lights over that of the others",
                 found.saliency_ratio, {"untrained": ratio}, low=4),
        _finding("What does it know?", "probe of the needed XOR, held-out accuracy", ends["xor"][0],
                 {"untrained": ends["xor"][1], "chance": 0.5}, low=0.95),
        _finding("What does it not keep?", "probe of the XOR that is not needed, held-out accuracy",
                 ends["unneeded_xor"][0], {"untrained": ends["unneeded_xor"][1], "chance": 0.5}, high=0.7),
        _finding("Can I change its mind?", "P(the other corner) at alpha 1", other[-1], {"at alpha 0": other[0]},
                 low=0.93),
        _finding("Is it this direction?", "P(the other corner) at alpha 1, minus the best of 8 random vectors",
                 float(other[-1]) - control, {"best random vector": control}, low=0.4),
    ]  # fmt: skip


def summary(found: Findings) -> list[tuple[str, ...]]:
    """One row of texts for each finding, in the order of ``COLUMNS``."""
    rows: list[tuple[str, ...]] = []
    for one in answers(found):
        beside = ", ".join(f"{name} {float(value):.2f}" for name, value in one.beside.items())
        expected = one.words.removeprefix("expected: ")
        rows.append(
            (one.question, one.measured, f"{float(one.value):.2f}", beside, expected, "yes" if one.met else "no")
        )
    return rows


def write(found: Findings, settings: Settings, folder: Path) -> Path:
    """Write findings and figures into the folder of the run, and the report of it; returns the path of the page."""
    save_findings(folder, answers(found))
    for name, drawing in drawings(found).items():
        drawing.save(folder / "figures" / f"{name}.svg")
    three_questions(found).save(folder / "overview.png")
    title = "CueCorners: what the agent looks at, what it knows, and changing its mind"
    return page_of(folder, title=title).save(folder / "report.html")


def drawings(found: Findings) -> dict[str, Drawing]:
    """The figures of the page by name."""
    response, episode = found.response, found.episode
    return {
        "1_learning": probe_curves(
            _concepts(found),
            {"success": found.behaviour},
            title="Two concepts, always in the same states",
            of="groups of states",
            caption="Success of the agent as it trains, and how well two concepts can be read from its second hidden "
            "layer, always in the same states (of random behaviour), on held-out episodes and states. The concept that "
            "the task needs rises above the untrained network, which is the first point of each curve; the one that it "
            "does not need falls below.",
        ),
        "2_lights": grouped_bars(
            _lights(found),
            unit=GRADIENT,
            title="Four lights, of which two matter",
            matters=NEEDED,
            of="episodes",
            caption="Only the first two lights decide which corner pays.",
        ),
        "3_maps": attribution_maps(
            found.planes,
            ("agent", "goals", "lights (row 1)"),
            unit="mean |gradient|",
            caption="The same gradient for every cell of the three planes of the observation.",
        ),
        "4_steering": dose_curve(
            response.alphas(),
            response.response("other"),
            random=response.control_response("other"),
            competence={"P(the corner that pays)": response.response("cued")},
            outcome="P(the other corner)",
            caption=f"Adding alpha times the difference vector of {found.vector.path} towards the corner that does not "
            "pay, in episodes from the same starts with the same noise; random vectors have equal norm.",
        ),
        "5_episode": attribution_through_episode(
            episode["attr", "observation"],
            CueCorners.feature_names,
            actions=episode["action"],
            action_names=CueCorners.action_names,
            rewards=episode["next", "reward"],
            others={"P(XOR is 1), by its probe": episode["probe", "xor"][:, 1]},
            unit="gradient",
            most=10,
            title="What it looks at in an episode",
            caption="The gradient of the chosen logit at each step of an episode that was not steered.",
        ),
    }


def three_questions(found: Findings) -> Drawing:
    """The figure of the README."""
    response = found.response
    return overview(
        _lights(found),
        _concepts(found),
        response.alphas(),
        response.response("other"),
        behaviour={"success of the agent": found.behaviour},
        random=response.control_response("other"),
        matters=NEEDED,
        units=(GRADIENT, "held-out probe accuracy", "P(the other corner)"),
    )


def _lights(found: Findings) -> dict[str, dict[str, Interval]]:
    return {light: {network: values[at] for network, values in found.lights.items()} for at, light in enumerate(LIGHTS)}


def _concepts(found: Findings) -> dict[str, dict[str, list[tuple[int, Interval]]]]:
    """The trained network over training; the untrained one is what the curves begin with."""
    return {
        CALLED[name]: {
            "trained": curve,
            "untrained": [(frames, curve[0][1]) for frames in (curve[0][0], curve[-1][0])],
        }
        for name, curve in found.known.items()
    }


def _finding(
    question: str,
    measured: str,
    value: Number,
    beside: dict[str, Number],
    low: float = -math.inf,
    high: float = math.inf,
) -> Finding:
    expected = f"at least {low:g}" if math.isfinite(low) else f"at most {high:g}"
    return Finding(
        question=question,
        measured=measured,
        value=value,
        beside=beside,
        words=f"expected: {expected}",
        met=low <= float(value) <= high,
    )
