"""The adapter table: ``python -m tests.adapter_table`` runs every cell and writes it into ``docs/adapters.md``.

A row is an agent of Stable-Baselines3, a column is a method (or a way to run one) on the policy that ``from_sb3`` makes
of it. Each cell is a difference between what that gives and the same by the agent's own code: hooks on its own modules,
autograd through its own functions, ``predict``.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import LRP, ActivationCaching, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.adapters import from_sb3
from tdhook_rl.attribution.integrated_gradients import quadrature
from tdhook_rl.latent import SteeringVector
from tdhook_rl.latent.probing import Probing
from tdhook_rl.sweeps import steering_sweep
from tests.sb3_agents import Endless, key_of, make_agent, observations, own_score, tensors

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
START, END = "<!-- written by python -m tests.adapter_table -->", "<!-- up to here -->"
ALGORITHMS = ("PPO", "A2C", "DQN", "SAC", "TD3")
POLICIES = {"MlpPolicy": "vector", "CnnPolicy": "pixels", "MultiInputPolicy": "dict"}
ROWS = [(name, policy) for name in ALGORITHMS for policy in POLICIES]
#: The second of the hidden layers, by the path that it has in the networks of the agent.
HIDDEN = {"PPO": "mlp_extractor.policy_net.1", "DQN": "q_net.1", "SAC": "latent_pi.1", "TD3": "mu.1"}
#: Points on the path of integrated gradients.
STEPS = 6


class Agent:
    """One agent, its policy of TorchRL, and what its own code gives."""

    def __init__(self, name: str, policy: str) -> None:
        torch.manual_seed(0)
        self.name, self.seen = name, POLICIES[policy]
        self.agent = make_agent(name, self.seen)
        self.agent.learn(8)
        self.agent.policy.set_training_mode(False)
        self.actor = from_sb3(self.agent)
        self.given, self.data = observations(self.agent)
        self.path = HIDDEN["PPO" if name == "A2C" else name]
        self.site = next(path for path, _ in self.actor.named_modules() if path.endswith(self.path))
        own: Any = self.agent.policy
        own = own.q_net if name == "DQN" else own.actor if name in ("SAC", "TD3") else own
        self.layer: nn.Module = own.get_submodule(self.path)
        self.vector = max((3 * torch.randn(16) for _ in range(20)), key=self.changed)
        #: What is explained: of a dictionary the vector in it.
        self.key = "speed" if self.seen == "dict" else key_of(self.agent.observation_space)
        with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
            self.batch = self.actor(self.data.clone())

    def changed(self, vector: Tensor) -> float:
        """In how many rows half of a vector changes what the agent does."""
        with self.hooked(lambda output: output + 0.5 * vector):
            steered = self.agent.predict(self.given, deterministic=True)[0]
        return float((steered != self.agent.predict(self.given, deterministic=True)[0]).mean())

    def env(self) -> GymWrapper:
        action = "one" if self.name in ("PPO", "A2C", "DQN") else "torque"
        return GymWrapper(Endless(self.seen, action), categorical_action_encoding=True)

    def predict(self, data: Any) -> np.ndarray:
        """By the agent itself, of observations in a TensorDict."""
        given = (
            {key: data[key].numpy() for key in self.given} if isinstance(self.given, dict) else data[self.key].numpy()
        )
        return self.agent.predict(given, deterministic=True)[0]

    @contextmanager
    def hooked(self, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """With a hook on the agent's own layer."""
        handle = self.layer.register_forward_hook(lambda module, args, output: function(output))
        try:
            yield
        finally:
            handle.remove()

    def activations(self) -> Tensor:
        kept: list[Tensor] = []
        with self.hooked(lambda output: kept.append(output.clone())):
            self.agent.predict(self.given, deterministic=True)
        return kept[0]

    def gradient(self, score: Callable[[Any], Tensor], value: Tensor | None = None) -> Tensor:
        """Of a score by the agent's own code, of what is explained, at its value or at another."""
        observed = tensors(self.agent, self.given)
        own = observed[self.key] if self.seen == "dict" else observed
        leaf = (own.float() if value is None else value).detach().requires_grad_()
        found = score({**observed, self.key: leaf} if self.seen == "dict" else leaf)
        return torch.autograd.grad(found.sum(), leaf)[0]

    def score(self) -> Callable[[Any], Tensor]:
        return own_score(self.agent, self.given, self.batch)

    def annotated(self, method: Any) -> TensorDict:
        with method.prepare(self.actor) as policy:
            return policy.annotate(self.batch.clone())


class Column(NamedTuple):
    """What is compared, and how far the two are from each other."""

    against: str
    difference: Callable[[Agent], float]


def apart(one: Any, other: Any) -> float:
    """The largest difference, as a share of the largest value; 0 where all bits are the same."""
    one, other = (
        torch.as_tensor(np.array(value.detach() if torch.is_tensor(value) else value)) for value in (one, other)
    )
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    if torch.equal(one, other):
        return 0.0
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-12))


def actions(row: Agent) -> float:
    return apart(row.actor(row.data.clone())["action"], row.agent.predict(row.given, deterministic=True)[0])


def values(row: Agent) -> float:
    observed, policy = tensors(row.agent, row.given), row.agent.policy
    with torch.no_grad():
        if row.name == "DQN":
            return apart(row.batch["action_value"], policy.q_net(observed))
        critic = from_sb3(row.agent, part="value")
        found = critic(row.batch.clone())
        if row.name in ("PPO", "A2C"):
            return apart(found["state_value"], policy.predict_values(observed))
        own = policy.critic(observed, row.batch["raw_action"])
        return max(apart(found[key], value) for key, value in zip(critic.out_keys, own, strict=True))


def saliency(row: Agent) -> float:
    return apart(row.annotated(Saliency(inputs=[row.key]))["attr", row.key], row.gradient(row.score()))


def integrated(row: Agent) -> float:
    found = row.annotated(IntegratedGradients(inputs=[row.key], baseline=0.0, n_steps=STEPS))["attr", row.key]
    observed = tensors(row.agent, row.given)
    x = (observed[row.key] if row.seen == "dict" else observed).float()
    points, weights = quadrature("gausslegendre", STEPS)
    rule = zip(points, weights, strict=True)
    return apart(found, x * sum(weight * row.gradient(row.score(), point * x) for point, weight in rule))


class Own(nn.Module):
    """The first output of the agent's network, by its own code, as a plain module."""

    def __init__(self, agent: Any, names: list[str]) -> None:
        super().__init__()
        self.policy, self.names = agent.policy, names

    def forward(self, *values: Tensor) -> Tensor:
        from stable_baselines3.common.policies import ActorCriticPolicy

        observed: Any = dict(zip(self.names, values, strict=True)) if self.names else values[0]
        if isinstance(self.policy, ActorCriticPolicy):
            features = self.policy.extract_features(observed, self.policy.pi_features_extractor)
            return self.policy.action_net(self.policy.mlp_extractor.forward_actor(features))[:, 0]
        if hasattr(self.policy, "q_net"):
            return self.policy.q_net(observed)[:, 0]
        actor = self.policy.actor
        latent = actor.extract_features(observed, actor.features_extractor)
        return actor.mu(actor.latent_pi(latent) if hasattr(actor, "latent_pi") else latent)[:, 0]


def lrp(row: Agent) -> float:
    output = {"DQN": "action_value", "SAC": "loc", "TD3": "raw_action"}.get(row.name, "logits")
    target = targets.Target("first", lambda run: run.outputs[output][..., 0])
    found = row.annotated(LRP(inputs=[row.key], target=target))["attr", row.key]
    names = list(row.given) if row.seen == "dict" else []
    own = Own(row.agent, names)
    keys = names or [row.key]
    with LRP(inputs=[row.key], target=targets.output_sum()).prepare(own, in_keys=keys, out_keys=["first"]) as policy:
        return apart(found, policy.annotate(row.data.clone())["attr", row.key])


def caching(row: Agent) -> float:
    with ActivationCaching(row.site).prepare(row.actor) as policy, torch.no_grad():
        return apart(policy(row.data.clone())["cache", row.site], row.activations())


def steering(row: Agent) -> float:
    with SteeringVectors({row.site: row.vector}, alpha=0.5).prepare(row.actor) as policy, torch.no_grad():
        found = policy(row.data.clone())["action"]
    with row.hooked(lambda output: output + 0.5 * row.vector):
        own = row.agent.predict(row.given, deterministic=True)[0]
    return apart(found, own)


def probing(row: Agent) -> float:
    seen: list[Tensor] = []

    class Keep:
        def __init__(self, key: str, direction: str) -> None:
            pass

        def step(self, activation: Tensor) -> None:
            seen.append(activation.detach().clone())

    with Probing(re.escape(row.site), Keep).prepare(row.actor) as policy, torch.no_grad():
        policy(row.data.clone())
    return apart(seen[0], row.activations())


def annotate(row: Agent) -> float:
    """Of rows as they were stored, in a batch of two dimensions, beside what the forward itself writes."""
    with Saliency(inputs=[row.key], when="step").prepare(row.actor) as policy, torch.no_grad():
        inline = policy(row.data.clone())
    with Saliency(inputs=[row.key]).prepare(row.actor) as policy:
        rows = inline.exclude("attr", "computed").reshape(2, 3)
        found = policy.annotate(rows)
    assert torch.equal(found["action"].reshape(inline["action"].shape), inline["action"])
    return apart(found["attr", row.key].reshape(inline["attr", row.key].shape), inline["attr", row.key])


def collector(row: Agent) -> float:
    """Two episodes, explained on the way: each action is the agent's for its observation."""
    options = {"frames_per_batch": 14, "total_frames": 14, "auto_register_policy_transforms": False}
    options["exploration_type"] = ExplorationType.DETERMINISTIC
    with Saliency(inputs=[row.key]).prepare(row.actor) as policy:
        made = Collector(row.env(), policy, postproc=policy.annotate, **options)
        [data] = list(made)
        made.shutdown()
    assert data["computed", "attr"].all()
    return max(apart(one["action"], row.predict(one)) for one in data.unbind(0))


def sweep(row: Agent) -> float:
    """Steered episodes: each action is that of the agent whose own layer is steered as much."""

    def taken(alpha: float) -> Callable[[TensorDict], Tensor]:
        def compare(episodes: TensorDict) -> Tensor:
            with row.hooked(lambda output: output + alpha * row.vector):
                own = [
                    [float(np.abs(step["action"].numpy() - row.predict(step)).max()) for step in one.unbind(0)]
                    for one in episodes.unbind(0)
                ]
            return torch.tensor(own).amax(1)

        return compare

    outcomes = {"plain": taken(0.0), "steered": taken(1.0)}
    vector = SteeringVector(vector=row.vector, path=row.site)
    found = steering_sweep(
        row.actor,
        row.env(),
        vector,
        alphas=[1.0],
        controls=0,
        episodes=2,
        max_steps=7,
        outcomes=outcomes,
        progress=False,
    )
    played = [(one["plain"], one["steered"]) for one in found.episodes() if one["alpha"] in (0.0, 1.0)]
    assert {one["alpha"] for one in found.episodes()} == {0.0, 1.0}
    assert any(plain != 0 for plain, _ in played)  # steering does something
    return max(one["steered" if one["alpha"] else "plain"] for one in found.episodes())


COLUMNS = {
    "actions": Column("`predict`", actions),
    "values": Column("`predict_values`, the critics or the Q-network", values),
    "`Saliency`": Column("autograd through its own functions", saliency),
    "`IntegratedGradients`": Column("the same, summed along the path", integrated),
    "`LRP`": Column("the same method on its own networks", lrp),
    "`ActivationCaching`": Column("a hook on its own layer", caching),
    "`SteeringVectors`": Column("a hook on its own layer, and `predict`", steering),
    "`Probing`": Column("a hook on its own layer", probing),
    "`annotate`": Column("the forward that acted", annotate),
    "collector": Column("`predict`, row by row", collector),
    "`steering_sweep`": Column("a hook on its own layer, and `predict`, row by row", sweep),
}  # fmt: skip
#: Where bits may differ: what is computed in another order of operations, in float32.
NEAR = {"`Saliency`", "`IntegratedGradients`", "`LRP`", "`annotate`"}
MOST = 2e-5


def cell(name: str, policy: str, column: str) -> float:
    """The difference of one cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return COLUMNS[column].difference(Agent(name, policy))


def word(difference: float) -> str:
    return "bit-equal" if difference == 0 else f"{difference:.0e}"


def table() -> str:
    """The table in Markdown."""
    lines = [f"| agent | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, policy in ROWS:
        words = [word(cell(name, policy, column)) for column in COLUMNS]
        lines.append(f"| {name} `{policy}` | {' | '.join(words)} |")
        print(lines[-1], file=sys.stderr)
    compared = "; ".join(f"{name}: {column.against}" for name, column in COLUMNS.items())
    versions = f"stable-baselines3 {version('stable-baselines3')}, torch {version('torch').split('+')[0]}, CPU, float32"
    return "\n".join([*lines, "", f"Compared with: {compared}. With {versions}."])


def main() -> None:
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
