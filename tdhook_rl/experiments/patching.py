"""E5: which activations carry the decision? Those of one run put into another."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained, logits
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import grouped_bars
from tdhook_rl.statistics import grouped_mean
from tdhook_rl.sweeps import patch_sites

CONTROLS = 32


def measure(trained: Trained) -> Findings:
    """Full and one-dimensional patches, in states where switching a light changes what the agent does."""
    actor, sites = trained.agent.actor, trained.recipe.sites
    off, on = _decisions(actor)
    # On states with the light off, with activations as they are with the light on.
    patched = partial(patch_sites, actor, off, on, list(sites.values()), way="noising", controls=0)
    gap = max(float((cell.shares - 1).abs().max()) for cell in patched())
    differences = {path: _activations(actor, path, on) - _activations(actor, path, off) for path in sites.values()}
    towards_b = torch.where(off["concept", "paying_corner"] == 0, 1.0, -1.0)
    lights = patched(
        direction={path: one.mean(0) for path, one in differences.items()}, controls=CONTROLS, seed=trained.seed
    )
    corners = patched(direction={path: (towards_b[:, None] * one).mean(0) for path, one in differences.items()})
    light, corner, random, size = {}, {}, {}, {}
    for name, path in sites.items():
        light[name], corner[name] = lights[path].median, corners[path].median
        size[name], random[name] = lights[path].size, lights[path].at_random.abs().median(-1).values.tolist()
    share = len(off) / len(CueCorners().paired_states(0)[0])
    checks = [
        Check("all of a layer patched (exact): largest distance of the share from 1", gap, high=0.0,
              beside=f"at {', '.join(sites)}"),
        Check("fc2: share of the logit difference that the corner's direction recovers", corner["fc2"], low=0.9,
              beside=f"the light's {light['fc2']:.2f} ({size['fc2']:.2f} in size)"),
        Check("pre1 (exact): share that the light's direction recovers", light["pre1"], low=0.9,
              beside=f"the corner's {corner['pre1']:.2f}"),
        Check(f"fc2: random directions, in size, mean of {CONTROLS}", grouped_mean(random["fc2"]), high=0.1,
              beside=f"most {max(random['fc2']):.3f}"),
        Check("states in which the light decides", share, low=0.7),
    ]  # fmt: skip
    return Findings(checks, {"the light": light, "the corner": corner, "random": random})


def plot(findings: Findings) -> list[Drawing]:
    """What one direction recovers, by layer."""
    light, corner, random = (findings.data[name] for name in ("the light", "the corner", "random"))
    groups = {
        site: {"the light": light[site], "the corner": corner[site], "random": grouped_mean(random[site])}
        for site in light
    }
    caption = (
        "In states where switching the first light changes the action, the component of a layer along one direction is "
        "replaced by that of the run with the light switched: along the mean difference of the light, on minus off, "
        "or of the corner that pays. The first linear layer carries the light, fc2 the corner; in between is the XOR."
    )
    title, unit = "Which activations carry the decision", "recovered share of the logit difference (median)"
    return [grouped_bars(groups, unit=unit, title=title, of="random directions", caption=caption)]


def _decisions(actor: nn.Module) -> tuple[TensorDict, TensorDict]:
    """Pairs of states that differ in the first light and in what the agent does."""
    off, on = (states.select("observation", "concept") for states in CueCorners().paired_states(0))
    changes = logits(actor, off).argmax(-1) != logits(actor, on).argmax(-1)
    if not bool(changes.any()):
        raise InputError("the first light changes no action of this agent, so there is nothing to patch")
    return off[changes], on[changes]


def _activations(actor: nn.Module, path: str, states: TensorDictBase) -> Tensor:
    with ActivationCaching(path).prepare(actor) as hooked:
        return hooked.annotate(states)["cache", path]


EXPERIMENT = Experiment(agent="cue_corners", title="Which activations carry the decision?", measure=measure, plot=plot)
