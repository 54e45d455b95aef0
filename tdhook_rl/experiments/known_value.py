"""E1: do attributions find what the value and the policy depend on, where that is known in closed form?"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl import targets
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.envs import KnownValue
from tdhook_rl.experiments.agents import Agent
from tdhook_rl.experiments.findings import Check, Experiment, Findings, Trained, logits
from tdhook_rl.experiments.training import untrained
from tdhook_rl.metrics import deletion_insertion, relevance_mass
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import grouped_bars
from tdhook_rl.statistics import grouped_mean

STATES = 2000
IG_STEPS = 32
RANDOM_ORDERS = 10
UNTRAINED = 24


def measure(trained: Trained) -> Findings:
    """Integrated gradients and gradients of the value and the policy, beside the truth."""
    env = KnownValue()
    states = env.sample_states(STATES, seed=10_000 + trained.seed)
    truth = env.attribution(states)
    value, policy = env.relevance("value"), env.relevance("policy")
    value_only = value & ~policy
    found = {name: _attributions(agent, states) for name, agent in trained.networks.items()}
    mass = {name: _mass(one["value"], value) for name, one in found.items()}
    cosine = grouped_mean(_cosines(found["trained"]["value"], truth))
    others = [_value_attribution(network, states) for network in _untrained(trained)]
    other_cosines = [float(_cosines(one, truth).mean()) for one in others]
    other_mass = [_mass(one, value) for one in others]
    decides = {name: _mass(one["policy"], policy) for name, one in found.items()}
    slope = {feature: grouped_mean(found["trained"]["gradient"][:, feature]) for feature in (2, 5)}
    areas = {name: _deletion(agent, states) for name, agent in trained.networks.items()}
    auc, random_auc = areas["trained"]
    chance = float(value.float().mean())
    checks = [
        Check("value: share of integrated gradients on the features that pay", mass["trained"], low=0.85,
              beside=f"chance {chance:.2f}, untrained {mass['untrained']:.2f}"),
        Check(f"... in untrained networks, mean of {UNTRAINED}", grouped_mean(other_mass), high=0.35,
              beside=f"chance {chance:.2f}, {min(other_mass):.2f} to {max(other_mass):.2f}"),
        Check("value: cosine with the true attribution", cosine, low=0.95,
              beside=f"untrained {float(_cosines(found['untrained']['value'], truth).mean()):.2f}"),
        Check(f"... in untrained networks, mean of {UNTRAINED}", grouped_mean(other_cosines), low=-0.25, high=0.25,
              beside=f"chance 0, {min(other_cosines):.2f} to {max(other_cosines):.2f}"),
        Check("value: mean gradient of the feature that drifts", slope[2], low=1.6, high=2.0,
              beside="true 1.786 (1.000 of the reward's)"),
        Check("value: mean gradient of the bonus", slope[5], low=0.9, high=1.1, beside="true 1"),
        Check("policy: share on the feature that decides", decides["trained"], low=0.65,
              beside=f"chance {1 / 16:.2f}, untrained {decides['untrained']:.2f}"),
        Check("policy: share on features that matter for value alone", _mass(found["trained"]["policy"], value_only),
              high=0.08, beside=f"chance {2 / 16:.2f}"),
        Check("deletion (faithful to the network?): area by attribution minus by chance", auc - random_auc, low=0.25,
              beside=f"{auc:.2f} and {random_auc:.2f}; untrained {areas['untrained'][0] - areas['untrained'][1]:.2f}"),
    ]  # fmt: skip
    means = {name: [grouped_mean(column, method="t") for column in one["value"].abs().T] for name, one in found.items()}
    return Findings(checks, {"truth": truth.abs().mean(0).tolist(), **means})


def plot(findings: Findings) -> list[Drawing]:
    """The mean attribution of every feature, beside the truth."""
    names = [f"x{feature}" for feature in range(16)]
    groups = {
        name: {network: findings.data[network][feature] for network in ("trained", "untrained")}
        for feature, name in enumerate(names)
    }
    caption = (
        "Features 2, 5 and 9 pay. Feature 11 drifts as feature 2 does, but nothing depends on it. The true attribution "
        "is that of the optimal value, in closed form."
    )
    drawing = grouped_bars(
        groups,
        unit="mean |integrated gradients| of the value",
        title="What the value depends on",
        truth=dict(zip(names, findings.data["truth"], strict=True)),
        matters=["x2", "x5", "x9"],
        of="states",
        caption=caption,
    )
    return [drawing]


def _untrained(trained: Trained) -> list[Agent]:
    """Networks of other seeds before training: what one untrained network happens to look at is chance."""
    return [untrained(trained.recipe, 1000 * (trained.seed + 1) + other) for other in range(UNTRAINED)]


def _value_attribution(agent: Agent, states: TensorDictBase) -> Tensor:
    with IntegratedGradients(target=targets.state_value(), baseline=0.0, n_steps=IG_STEPS).prepare(agent.critic) as net:
        return net.annotate(states)["attr", "observation"]


def _attributions(agent: Agent, states: TensorDictBase) -> dict[str, Tensor]:
    value = _value_attribution(agent, states)
    with Saliency(target=targets.state_value()).prepare(agent.critic) as net:
        gradient = net.annotate(states)["attr", "observation"]
    acted = states.clone().set("action", logits(agent.actor, states).argmax(-1))
    with IntegratedGradients(target=targets.margin(), baseline=0.0, n_steps=IG_STEPS).prepare(agent.actor) as net:
        policy = net.annotate(acted)["attr", "observation"]
    return {"value": value, "gradient": gradient, "policy": policy}


def _mass(attribution: Tensor, mask: Tensor) -> float:
    return float(relevance_mass(attribution.abs().mean(0), mask))


def _cosines(attribution: Tensor, truth: Tensor) -> Tensor:
    return torch.cosine_similarity(attribution, truth, dim=-1)


def _deletion(agent: Agent, states: TensorDictBase) -> tuple[float, float]:
    """How fast the value changes as features go, by their attribution and in random orders; 1 is at once."""
    method = IntegratedGradients(target=targets.state_value(), baseline=0.0, n_steps=IG_STEPS)
    with method.prepare(agent.critic) as hooked:
        explained = hooked.annotate(states)

        def area(data: TensorDictBase) -> float:
            found = deletion_insertion(hooked, data, baseline=0.0, absolute=True, n_random=1)
            change = (found.deletion_curve - found.deletion_curve[..., :1]).abs().mean(0)
            return float(torch.trapezoid(change / change[-1], found.shares))

        draws = torch.Generator().manual_seed(0)
        shape = explained["attr", "observation"].shape
        orders = [
            explained.clone().set(("attr", "observation"), torch.rand(shape, generator=draws))
            for _ in range(RANDOM_ORDERS)
        ]
        return area(explained), sum(map(area, orders)) / RANDOM_ORDERS


EXPERIMENT = Experiment(
    agent="known_value",
    title="Do attributions find what the value and the policy depend on?",
    measure=measure,
    plot=plot,
)
