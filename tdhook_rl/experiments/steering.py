"""E2: does one direction change where the agent goes, more than random directions of the same length?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.demo import outcomes
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import dose_curve
from tdhook_rl.statistics import paired_difference
from tdhook_rl.sweeps import SteeringVector, SweepResult, steering_sweep

EPISODES = 1024
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LIGHT = 0


def measure(trained: Trained) -> Findings:
    """Dose and response at the second hidden layer, and the exact case at the first linear layer."""
    actor, sites = trained.agent.actor, trained.recipe.sites
    response = _sweep(trained, contrast(actor), lambda start: 1.0 - 2.0 * (start["concept", "paying_corner"] == 0))
    weights = dict(actor.named_parameters())[f"{sites['pre1']}.weight"].detach()
    flip = SteeringVector(vector=weights[:, CueCorners.light_features()[LIGHT]], path=sites["pre1"])
    exact = _sweep(trained, flip, lambda start: 1.0 - 2.0 * start["concept", "bits"][:, LIGHT])
    other = response.response("other")
    rises = [paired_difference(*(response.of("other", alpha=alpha) for alpha in pair)) for pair in pairwise(ALPHAS)]
    control = float(response.control_response("other")[:, -1].max())
    half = exact.mean("other", alpha=0.5)
    checks = [
        Check("P(other corner) at alpha 1", other[-1], low=0.93, beside=f"at alpha 0 {other[0]:.3f}"),
        Check("smallest rise from one alpha to the next", min(rises, key=float), low=0.005,
              beside="alpha 0, 0.25, 0.5, 0.75, 1"),
        Check("P(other corner) at alpha 1 minus the best random direction", float(other[-1]) - control, low=0.4,
              beside=f"best of 8: {control:.3f}; adjusted p {response.table('other')[-1].adjusted:.1g}"),
        Check("first layer: largest change of a logit, steering against the input", _exact_gap(trained, flip),
              high=1e-5, beside="exact in real numbers"),
        Check("first layer: P(other corner) at alpha 1", exact.mean("other", alpha=1.0), low=0.93),
        Check("first layer: P(other corner) at alpha 0.5, away from a half", abs(float(half) - 0.5), high=0.15,
              beside=f"{half:.3f} ({half.low:.3f} to {half.high:.3f})"),
        Check("the strength at which half of the effect is reached", response.alpha_50("other"), low=0.25, high=0.75),
    ]  # fmt: skip
    return Findings(checks, {"response": response})


def plot(findings: Findings) -> list[Drawing]:
    """The dose-response curve."""
    response: SweepResult = findings.data["response"]
    drawing = dose_curve(
        response.alphas(),
        response.response("other"),
        random=response.control_response("other"),
        competence={"the corner that pays": response.response("cued")},
        outcome="P(the other corner)",
        caption="The difference vector of the second hidden layer is added towards the corner that does not pay, in "
        "episodes from the same starts with the same noise; random directions have its length.",
    )
    return [drawing]


def _sweep(trained: Trained, vector: SteeringVector, sign: Callable[[TensorDictBase], Tensor]) -> SweepResult:
    with set_exploration_type(ExplorationType.RANDOM):
        return steering_sweep(
            trained.agent.actor, CueCorners(), vector, outcomes=outcomes, sign=sign, controls=8, episodes=EPISODES,
            max_steps=30, seed=20_000 + trained.seed, progress=False,
        )  # fmt: skip


def _exact_gap(trained: Trained, flip: SteeringVector) -> float:
    """Adding the column of the weights that reads a light is switching the light on."""
    off, on = CueCorners().paired_states(LIGHT)
    with torch.no_grad(), SteeringVectors({flip.path: flip.vector}).prepare(trained.agent.actor) as steered:
        return float((steered(off.clone())["logits"] - trained.agent.actor(on.clone())["logits"]).abs().max())


EXPERIMENT = Experiment(
    agent="cue_corners", title="Does one direction change where the agent goes?", measure=measure, plot=plot
)
