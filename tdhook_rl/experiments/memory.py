"""E4: what does a recurrent agent remember, and does steering its state early change what it decides late?"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching
from tdhook_rl.experiments.agents import Agent
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained, accuracy, share
from tdhook_rl.latent.gates import AtSteps
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import lines
from tdhook_rl.statistics import Interval, grouped_mean, r_squared
from tdhook_rl.sweeps import SweepResult, steering_sweep

EPISODES = 1024
LAST = 8  # the step at which the agent chooses
TIMES = (0, 4, 8)
ALPHAS = (0.25, 0.5, 1.0)
CONTROLS = 8
LOST = "lost"


def measure(trained: Trained) -> Findings:
    """What the cue explains of the state at each step, a probe of it, and steering of the state at single steps.

    A probe alone would not tell: a trace of the cue, a hundredth as long as after training, is left in an untrained GRU
    as well, and what is there without noise can be read, however small it is.
    """
    site = trained.recipe.sites["gru"]
    env = trained.recipe.env(batch_size=[EPISODES], seed=20_000 + trained.seed)
    played = {name: _play(agent, env, site, trained.seed) for name, agent in trained.networks.items()}
    concepts = ("cue", "unneeded_cue", "shuffled")
    probes = {
        name: {concept: accuracy(data[:, LAST], _cached(data), concept) for concept in concepts}
        for name, data in played.items()
    }
    explained = {
        name: {concept: [_explained(data[:, step], concept) for step in range(LAST + 1)] for concept in concepts}
        for name, data in played.items()
    }
    data = played["trained"]
    right = float((data["next", "reward"][:, LAST] > 0).float().mean())
    flips = {step: _steered(trained, env, site, data, step) for step in TIMES}
    last = {name: one["cue"][LAST] for name, one in explained.items()}
    checks = [
        Check("episodes won", share(right, EPISODES), low=0.95, beside="chance 0.5"),
        Check("probe of the cue at the last step", probes["trained"]["cue"], low=0.95,
              beside=f"the second cue {probes['trained']['unneeded_cue'].estimate:.2f}, shuffled labels "
              f"{probes['trained']['shuffled'].estimate:.2f}; untrained {probes['untrained']['cue'].estimate:.2f}"),
        Check("share of the state's variance at the last step that the cue explains", last["trained"], low=0.8,
              beside=f"the second cue {explained['trained']['unneeded_cue'][LAST].estimate:.3f}"),
        Check("... in the untrained network", last["untrained"], high=0.05, beside="what its probe reads all the same"),
        *[Check(f"steering the state at step {step} flips the last action", one.mean(LOST, alpha=1.0), low=0.95,
                beside=f"alpha 0.5: {one.mean(LOST, alpha=0.5):.2f}") for step, one in flips.items()],
        *[Check(f"random directions at step {step}, mean of {CONTROLS}",
                grouped_mean(one.control_response(LOST)[:, -1], method="t"), high=0.10,
                beside=f"most {float(one.control_response(LOST)[:, -1].max()):.3f}") for step, one in flips.items()],
    ]  # fmt: skip
    return Findings(checks, {"explained": explained})


def plot(findings: Findings) -> list[Drawing]:
    """The share of the state that is about each cue, by step."""
    explained = findings.data["explained"]
    shown = {
        "cue (needed), trained": explained["trained"]["cue"],
        "cue (needed), untrained": explained["untrained"]["cue"],
        "second cue (not needed), trained": explained["trained"]["unneeded_cue"],
        "shuffled labels, trained": explained["trained"]["shuffled"],
    }
    curves = {name: list(enumerate(values)) for name, values in shown.items()}
    caption = (
        "The cues are seen at step 0 only. The trained network keeps the one that it needs until it chooses at step 8: "
        "in the end its state is about nothing else. The other, which never pays, fades, as both do in an untrained "
        "network. Shuffled labels explain nothing."
    )
    title, unit = "What it remembers", "explained variance of the state"
    return [lines(curves, unit=unit, axis="step of the episode", title=title, of="episodes", caption=caption)]


def _play(agent: Agent, env: EnvBase, site: str, seed: int) -> TensorDictBase:
    """An episode of each copy, with the most probable actions."""
    env.set_seed(50_000 + seed)
    method = ActivationCaching(site)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC), method.prepare(agent.actor) as hooked:
        data = env.rollout(LAST + 1, hooked, break_when_any_done=False)
    data["episode"] = torch.arange(EPISODES)[:, None].expand(data.batch_size)
    order = torch.randperm(EPISODES, generator=torch.Generator().manual_seed(seed))
    data["concept", "shuffled"] = data["concept", "cue"][order]
    return data


def _explained(rows: TensorDictBase, concept: str) -> Interval:
    """The share of the variance of the state that lies between the values of a concept."""
    state, labels = rows[_cached(rows)].double(), rows["concept", concept]
    centres = torch.stack([state[labels == label].mean(0) for label in (0, 1)])
    total, within = ((state - about).square().sum(-1) for about in (state.mean(0), centres[labels]))
    return r_squared(torch.stack([torch.ones_like(total), torch.zeros_like(total), total, within], 1))


def _cached(rows: TensorDictBase) -> NestedKey:
    return next(key for key in rows.keys(True, True) if key[0] == "cache")


def _steered(trained: Trained, env: EnvBase, site: str, plain: TensorDictBase, step: int) -> SweepResult:
    """The state steered away from the cue at one step: what the GRU returns, and what it carries on."""
    hidden, cue = plain["cache", site][:, step], plain["concept", "cue"][:, LAST]
    vector = hidden[cue == 1].mean(0) - hidden[cue == 0].mean(0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        return steering_sweep(
            trained.agent.actor, env, {"cue": {site: vector, (site, ("next", "recurrent_state")): vector[None]}},
            alphas=ALPHAS, controls=CONTROLS, episodes=EPISODES, max_steps=LAST + 1, progress=False,
            outcomes={LOST: lambda data: (data["next", "reward"][:, LAST] <= 0).squeeze(-1)},
            sign=lambda start: 1.0 - 2.0 * start["concept", "cue"], when=AtSteps([step], key="elapsed"),
            seed=50_000 + trained.seed,
        )  # fmt: skip


EXPERIMENT = Experiment(
    agent="t_maze",
    title="What does a recurrent agent remember, and can its memory be changed?",
    measure=measure,
    plot=plot,
)
