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
from tdhook_rl.latent import ActivationPatching
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import grouped_bars
from tdhook_rl.statistics import grouped_mean

CONTROLS = 32


def measure(trained: Trained) -> Findings:
    """Full and one-dimensional patches, in states where switching a light changes what the agent does."""
    actor, sites = trained.agent.actor, trained.recipe.sites
    clean, corrupt = _decisions(actor)
    outputs = {name: logits(actor, one) for name, one in (("clean", clean), ("corrupt", corrupt))}
    full = {name: _patched(actor, path, clean, corrupt, None) for name, path in sites.items()}
    gap = max(float((one - outputs["corrupt"]).abs().max()) for one in full.values())
    light, corner, random, size = {}, {}, {}, {}
    draws = torch.Generator().manual_seed(trained.seed)
    towards_b = torch.where(clean["concept", "paying_corner"] == 0, 1.0, -1.0)
    for name, path in sites.items():
        difference = _activations(actor, path, corrupt) - _activations(actor, path, clean)
        recovered = partial(_recovered, actor, path, clean, corrupt, outputs)
        light[name], size[name] = recovered(difference.mean(0)), recovered(difference.mean(0), size=True)
        corner[name] = recovered((towards_b[:, None] * difference).mean(0))
        noise = torch.randn(CONTROLS, difference.shape[-1], generator=draws)
        random[name] = [recovered(one, size=True) for one in noise]
    share = len(clean) / len(CueCorners().paired_states(0)[0])
    checks = [
        Check("all of a layer patched (exact): largest change of a logit against the corrupted run", gap, high=0.0,
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


def _patched(
    actor: nn.Module, path: str, clean: TensorDictBase, corrupt: TensorDictBase, direction: Tensor | None
) -> Tensor:
    """The logits on clean inputs with activations of the corrupted run: all of them, or their part in a direction."""
    function = None if direction is None else partial(_along, direction=direction / direction.norm())
    data = corrupt.clone().set(("patched", "observation"), clean["observation"])
    with torch.no_grad(), ActivationPatching([path], patch_fn=function).prepare(actor) as hooked:
        return hooked(data)["patched", "logits"]


def _along(path: str, here: Tensor, first: Tensor, direction: Tensor) -> Tensor:
    component = ((first - here) * direction).sum(-1, keepdim=True)
    return here + component * direction


def _recovered(
    actor: nn.Module,
    path: str,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    outputs: dict[str, Tensor],
    direction: Tensor,
    size: bool = False,
) -> float:
    """The median share (or its size) of the change of logit difference between two actions; 1: the corrupted run."""
    actions = torch.stack([outputs["clean"].argmax(-1), outputs["corrupt"].argmax(-1)], -1)

    def difference(logits: Tensor) -> Tensor:
        first, second = logits.gather(-1, actions).unbind(-1)
        return second - first

    start, end = difference(outputs["clean"]), difference(outputs["corrupt"])
    reached = difference(_patched(actor, path, clean, corrupt, direction))
    share = (reached - start) / (end - start)
    return float((share.abs() if size else share).median())


EXPERIMENT = Experiment(agent="cue_corners", title="Which activations carry the decision?", measure=measure, plot=plot)
