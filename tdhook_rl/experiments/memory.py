"""E4: what does a recurrent agent remember, and does steering its state early change what it decides late?"""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, SteeringVectors
from tdhook_rl.experiments.agents import Agent
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained
from tdhook_rl.report import Figure
from tdhook_rl.report.figures import series
from tdhook_rl.rollout import GroupSplit, OnlineProbe

__all__ = ["EXPERIMENT"]

EPISODES = 1024
LAST = 8  # the step at which the agent chooses
TIMES = (0, 4, 8)
ALPHAS = (0.25, 0.5, 1.0)
CONTROLS = 8
#: Of the probe, as a share of the mean variance. A trace of the cue is left in an untrained GRU as well, a hundredth of
#: its length after training; a probe that trusts directions of little variance reads it.
PENALTY, TRUSTING = 3.0, 0.01


def measure(trained: Trained) -> Findings:
    """A probe of the cue at each step, and steering of the hidden state at single steps."""
    site = trained.recipe.sites["gru"]
    env = trained.recipe.env(batch_size=[EPISODES], seed=20_000 + trained.seed)
    played = {name: _play(agent, env, site, trained.seed) for name, agent in trained.networks.items()}
    probes = {
        name: {concept: [_accuracy(data[:, step], concept) for step in range(LAST + 1)]
               for concept in ("cue", "unneeded_cue", "shuffled")}
        for name, data in played.items()
    }  # fmt: skip
    data = played["trained"]
    cue = data["concept", "cue"][:, LAST]
    right = float((data["next", "reward"][:, LAST] > 0).float().mean())
    flips, by_alpha, controls = {}, {}, {}
    draws = torch.Generator().manual_seed(trained.seed)
    for step in TIMES:
        hidden = data["cache", site][:, step]
        vector = hidden[cue == 1].mean(0) - hidden[cue == 0].mean(0)
        by_alpha[step] = [_flipped(trained.agent, env, site, data, vector, step, alpha) for alpha in ALPHAS]
        flips[step] = by_alpha[step][-1]
        noise = torch.randn(CONTROLS, len(vector), generator=draws)
        noise = noise / noise.norm(dim=1, keepdim=True) * vector.norm()
        controls[step] = [_flipped(trained.agent, env, site, data, one, step, 1.0) for one in noise]
    mean_control = {step: sum(values) / CONTROLS for step, values in controls.items()}
    last = {name: one["cue"][LAST] for name, one in probes.items()}
    checks = [
        Check("episodes won", right, low=0.95, beside="chance 0.5"),
        Check("probe of the cue at the last step", last["trained"], low=0.95,
              beside=f"the second cue {probes['trained']['unneeded_cue'][LAST]:.2f}, "
              f"shuffled labels {probes['trained']['shuffled'][LAST]:.2f}"),
        Check("... in the untrained network", last["untrained"], high=0.60,
              beside=f"{_accuracy(played['untrained'][:, LAST], 'cue', TRUSTING):.2f} with a penalty of {TRUSTING}"),
        *[Check(f"steering the state at step {step} flips the last action", flips[step], low=0.95,
                beside=f"alpha 0.5: {by_alpha[step][1]:.2f}") for step in TIMES],
        *[Check(f"random directions at step {step}, mean of 8", mean_control[step], high=0.10,
                beside=f"most {max(controls[step]):.3f}") for step in TIMES],
    ]  # fmt: skip
    return Findings(checks, {"probes": probes})


def draw(findings: Findings, folder: Path) -> list[Figure]:
    """The probes by step."""
    probes = findings.data["probes"]
    lines = {
        "cue (needed), trained": probes["trained"]["cue"],
        "cue (needed), untrained": probes["untrained"]["cue"],
        "second cue (not needed), trained": probes["trained"]["unneeded_cue"],
        "shuffled labels, trained": probes["trained"]["shuffled"],
    }
    path = series(folder / "memory.png", range(LAST + 1), lines, "step of the episode", "probe accuracy (held out)")
    caption = (
        "The cues are seen at step 0 only. The trained network keeps the one that it needs until it chooses at step 8; "
        "the other, which never pays, fades, as both do in an untrained network. Shuffled labels cannot be read."
    )
    return [Figure("What it remembers", path, caption)]


def _play(agent: Agent, env: EnvBase, site: str, seed: int) -> TensorDictBase:
    """An episode of each copy, with the most probable actions."""
    env.set_seed(50_000 + seed)
    method = ActivationCaching(site)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC), method.prepare(agent.actor) as hooked:
        data = env.rollout(LAST + 1, hooked, break_when_any_done=False)
    data["episode"] = torch.arange(EPISODES)[:, None].expand(data.batch_size)
    order = torch.randperm(EPISODES, generator=torch.Generator().manual_seed(seed))
    data["concept", "shuffled"] = data["concept", "cue"][order]
    data["seed"] = torch.full(data.batch_size, 50_000 + seed)
    return data


def _accuracy(rows: TensorDictBase, concept: str, penalty: float = PENALTY) -> float:
    features = next(key for key in rows.keys(True, True) if key[0] == "cache")
    split = GroupSplit("episode", held_out=0.3)
    probe = OnlineProbe(features=features, label=("concept", concept), split=split, penalty=penalty)
    return probe.update(rows)["accuracy"]


class _At:
    """The strength of steering in each row: away from the cue, at one step."""

    def __init__(self, step: int, alpha: float) -> None:
        self.step = step
        self.alpha = alpha

    def __call__(self, elapsed: Tensor, cue: Tensor) -> Tensor:
        return torch.where(elapsed == self.step, self.alpha * (1.0 - 2.0 * cue), 0.0)


def _flipped(
    agent: Agent, env: EnvBase, site: str, plain: TensorDictBase, vector: Tensor, step: int, alpha: float
) -> float:
    """The share of episodes whose last action changes when the state is steered at one step."""
    env.set_seed(int(plain["seed"][0, 0]))
    strength = TensorDictModule(_At(step, alpha), in_keys=["elapsed", ("concept", "cue")], out_keys=["strength"])
    # What the GRU returns now, and what it carries to the next step.
    method = SteeringVectors({site: vector, (site, ("next", "recurrent_state")): vector[None]}, alpha="strength")
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC), method.prepare(agent.actor) as steered:
        data = env.rollout(LAST + 1, TensorDictSequential(strength, steered), break_when_any_done=False)
    return float((data["action"][:, LAST] != plain["action"][:, LAST]).float().mean())


EXPERIMENT = Experiment(
    agent="t_maze",
    title="What does a recurrent agent remember, and can its memory be changed?",
    measure=measure,
    draw=draw,
)
