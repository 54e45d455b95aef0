"""E3: what does the agent know, when did it learn it, and what do wrong splits and steering make of it?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.envs import CueGrid
from tdhook_rl.examples.demo import outcomes
from tdhook_rl.experiments.agents import Agent
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained, accuracy, logits, share
from tdhook_rl.probes import GroupSplit
from tdhook_rl.replay import probe_grid
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import probe_curves
from tdhook_rl.statistics import Interval, paired_difference
from tdhook_rl.sweeps import SteeringVector, SweepResult, steering_sweep

#: States that 1024 agents reach by random moves in 32 steps: 3,000 episodes of a few steps each, so that the standard
#: error of an accuracy on the held-out ones is below .02.
ENVS, STEPS = 1024, 32
#: The leakage of a wrong split is the larger, the fewer the episodes: measured in parts of about 100 each.
PARTS, OF = 12, 32
EPISODES = 1024
SKILLED = 0.9


def measure(trained: Trained) -> Findings:
    """Probes by layer, concept and network; over training; with a wrong split; and the steering control."""
    sites = trained.recipe.sites
    fc2 = sites["fc2"]
    states = _states(20_000 + trained.seed)
    agents = {0: trained.untrained, **trained.snapshots, trained.recipe.frames: trained.agent}
    table = probe_grid(
        trained.agent.actor, states, sites=[fc2], untrained=trained.untrained.actor,
        concepts={name: ("concept", name) for name in ("xor", "unneeded_xor", "control_label")},
        checkpoints={f"{frames}": agent.actor for frames, agent in agents.items()},
        split=GroupSplit("episode", held_out=0.3),
    )  # fmt: skip
    last = f"{trained.recipe.frames}"
    needed, unneeded, control = (table[last, fc2, name] for name in ("xor", "unneeded_xor", "control_label"))
    seen = _seen(trained.agent, states, {"fc2": fc2})
    coin = {
        split: [accuracy(part, ("cache", fc2), "episode_coin", grouping).estimate for part in seen.chunk(OF)[:PARTS]]
        for split, grouping in {"transitions": "row", "trajectories": "episode"}.items()
    }
    leak = paired_difference(coin["trajectories"], coin["transitions"])
    curves: dict[str, list[tuple[int, Interval]]] = {
        "behaviour": [(frames, share(_success(agent, trained.seed), EPISODES)) for frames, agent in agents.items()]
    }
    for curve, name in (("probe", "xor"), ("unneeded", "unneeded_xor")):
        curves[curve] = [(frames, table[f"{frames}", fc2, name].trained) for frames in agents]
    first = {name: _reaches(curve, SKILLED) for name, curve in curves.items()}
    steered = {name: _steered(trained, path, states) for name, path in sites.items() if name in ("fc2", "fc3")}
    ratio = {name: _saliency_ratio(agent, states) for name, agent in trained.networks.items()}
    checks = [
        Check("probe of the needed XOR at fc2", needed.trained, low=0.95,
              beside=f"observation {needed.input:.2f}, untrained {needed.untrained:.2f}, "
              f"random label {control.trained:.2f}, label dealt out by episode {needed.shuffled:.2f}"),
        Check("probe of the XOR that is not needed", unneeded.trained, high=0.60,
              beside=f"untrained {unneeded.untrained:.2f}"),
        Check("needed XOR, trained minus untrained", needed.gain, low=0.25, beside=f"adjusted p {needed.adjusted:.1g}"),
        Check(f"a coin of the episode: split by transitions minus by trajectories, mean of {PARTS} parts", leak,
              low=0.2, beside=" and ".join(f"{sum(values) / PARTS:.2f}" for values in coin.values())),
        Check("frames until the probe reaches 0.9, of those until the agent does",
              first["probe"] / max(first["behaviour"], 1.0), low=0.01, high=0.75,
              beside=f"{first['probe']:,.0f} and {first['behaviour']:,.0f}"),
        *[Check(f"P(other goal) at alpha 1, mean-difference vector at {name}", one.mean("other", alpha=1.0), high=0.12,
                beside=_beside(one))
          for name, one in steered.items()],
        Check("saliency of the chosen logit, lights that matter over lights that do not", ratio["trained"], low=4.0,
              beside=f"untrained {ratio['untrained']:.2f}"),
        Check("episodes that reach the goal that pays, not steered", curves["behaviour"][-1][1], low=0.9),
    ]  # fmt: skip
    before = {cell.concept: cell.untrained for cell in (needed, unneeded)}
    return Findings(checks, {"curves": curves, "untrained": before})


def plot(findings: Findings) -> list[Drawing]:
    """Behaviour and probes over training."""
    curves, untrained = findings.data["curves"], findings.data["untrained"]
    ends = [curves["behaviour"][at][0] for at in (0, -1)]
    concepts = {
        name: {"trained": curves[curve], "untrained": [(frames, untrained[concept]) for frames in ends]}
        for name, curve, concept in (
            ("XOR (needed)", "probe", "xor"),
            ("other XOR (not needed)", "unneeded", "unneeded_xor"),
        )
    }
    caption = (
        "Probes of the second hidden layer on held-out episodes, for the agent as it was after so many frames. The "
        "concept that the task needs can be read before the agent acts on it; the one that it does not need is lost."
    )
    return [probe_curves(concepts, {"episodes won": curves["behaviour"]}, of="episodes", caption=caption)]


def _states(seed: int) -> TensorDictBase:
    env = CueGrid(batch_size=[ENVS], seed=seed)
    with torch.random.fork_rng(devices=[]):  # random actions are drawn from torch's generator
        torch.manual_seed(seed)
        data = env.rollout(STEPS, break_when_any_done=False)
    ended = data["next", "done"].squeeze(-1).long()
    earlier = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1).cumsum(1)
    data["episode"] = earlier + torch.arange(ENVS)[:, None] * (STEPS + 1)
    data["row"] = torch.arange(data.numel()).reshape(data.batch_size)
    return data.select("observation", "concept", "elapsed", "episode", "row").reshape(-1)


def _seen(agent: Agent, states: TensorDictBase, sites: Mapping[str, str]) -> TensorDictBase:
    with ActivationCaching(list(sites.values())).prepare(agent.actor) as hooked:
        return hooked.annotate(states)


def _success(agent: Agent, seed: int) -> float:
    env = CueGrid(batch_size=[EPISODES], seed=30_000 + seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        played = env.rollout(env.max_steps, agent.actor, break_when_any_done=False)
    return float(outcomes(played)["cued"].float().mean())


def _reaches(curve: list[tuple[int, Interval]], level: float) -> float:
    """The frames at which a curve first reaches a level; NaN, which meets no expectation, where it does not."""
    return next((float(frames) for frames, value in curve if value.estimate >= level), float("nan"))


def _steered(trained: Trained, path: str, states: TensorDictBase) -> SweepResult:
    """The mean difference of goal A paying and goal B paying, added away from the goal that pays."""
    env = CueGrid()
    before, after = env.paired("paying_goal", states=states)
    a, b = _swapped(before["concept", "paying_goal"] == 0, before.select("observation"), after.select("observation"))
    vector = SteeringVector.from_pairs(trained.agent.actor, path, a, b)
    with set_exploration_type(ExplorationType.RANDOM):
        return steering_sweep(
            trained.agent.actor, env, vector, outcomes=outcomes, alphas=(1.0,), controls=8, episodes=EPISODES,
            sign=lambda start: 1.0 - 2.0 * (start["concept", "paying_goal"] == 0), max_steps=30,
            seed=40_000 + trained.seed, progress=False,
        )  # fmt: skip


def _beside(response: SweepResult) -> str:
    won = response.response("cued")
    control = float(response.control_response("other")[:, -1].max())
    return (
        f"alpha 0: {response.mean('other'):.3f}, best of 8 random {control:.3f}; P(goal that pays) {won[0]:.2f} to "
        f"{won[-1]:.2f}"
    )


def _swapped(first: Tensor, before: TensorDictBase, after: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
    """Both members of each pair, those where goal A pays first."""
    return torch.cat([before[first], after[~first]]), torch.cat([after[first], before[~first]])


def _saliency_ratio(agent: Agent, states: TensorDictBase) -> float:
    with Saliency(target=targets.chosen_logit()).prepare(agent.actor) as hooked:
        seen = hooked.annotate(states.clone().set("action", logits(agent.actor, states).argmax(-1)))
    lights = seen["attr", "observation"].abs().mean(0)[CueGrid.light_features()]
    return float(lights[:2].mean() / lights[2:].mean())


EXPERIMENT = Experiment(
    agent="cue_grid", title="What does the agent know, and when did it learn it?", measure=measure, plot=plot
)
