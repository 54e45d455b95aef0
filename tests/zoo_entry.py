"""What an entry of the zoo holds, and scores of actions written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import Compose, EnvBase, TransformedEnv

from tdhook_rl import targets
from tdhook_rl.targets import Target
from tests.mock_env import MockEnv
from tests.policies import ACTIONS, FEATURES, HIDDEN

AGENTS, ATOMS, CONTEXT, CONTROLS = 3, 5, 3, 2
SUPPORT = torch.linspace(-1, 1, ATOMS)
OBSERVED = ("agents", "observation")

Outputs = dict[NestedKey, Tensor]

VECTOR = {"observation": Unbounded((FEATURES,))}
DISCRETE = {"action": CategoricalSpec(ACTIONS)}
CONTINUOUS = {"action": Bounded(-1.0, 1.0, shape=(CONTROLS,))}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A policy of the zoo.

    Args:
        build: makes the policy (or the critic).
        site: a module inside it, whose output has one row of ``features`` for each row of the batch.
        first: what the site computes, by hand: ``(policy, rows) -> (rows, *features)``.
        rest: what the policy computes from that, by hand.
        score: by hand, what attributions explain by default: the taken action where there is one.
        value: the target for the value, and the value by hand.
        observations, actions: of the environment.
        explained: the inputs that are explained.
        critic: a value network, which does not act.
        transforms: of the environment, made for a policy.
    """

    build: Callable[[], nn.Module]
    site: str
    features: tuple[int, ...] = (HIDDEN,)
    first: Callable[[Any, TensorDictBase], Tensor]
    rest: Callable[[Any, Tensor, TensorDictBase], Outputs]
    score: Callable[[Outputs, TensorDictBase], Tensor]
    target: Target | None = None
    value: tuple[Target, Callable[[Outputs, TensorDictBase], Tensor]] | None = None
    observations: Mapping[NestedKey, TensorSpec] = field(default_factory=lambda: VECTOR)
    actions: Mapping[NestedKey, TensorSpec] = field(default_factory=lambda: DISCRETE)
    explained: tuple[NestedKey, ...] = ("observation",)
    critic: bool = False
    transforms: Callable[[Any], list] = lambda policy: []

    def env(self, policy: nn.Module, *batch: int, seed: int = 0) -> EnvBase:
        strength = {"strength": Unbounded(())}
        env: EnvBase = MockEnv({**self.observations, **strength}, self.actions, batch_size=batch, seed=seed)
        transforms = self.transforms(policy)
        return TransformedEnv(env, Compose(*transforms)) if transforms else env


def index_log_prob(logits: NestedKey = "logits", action: NestedKey = "action") -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        found = outputs[logits].log_softmax(-1).gather(-1, data[action].unsqueeze(-1)).squeeze(-1)
        return found.reshape(len(data), -1).sum(-1)

    return score


def one_hot_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    return (outputs["logits"].log_softmax(-1) * data["action"]).sum(-1)


def masked_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    logits = outputs["logits"].masked_fill(~data["action_mask"], -torch.inf)
    return logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)


def tanh_normal_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    loc, scale, action = outputs["loc"], outputs["scale"], data["action"].double().clamp(-1 + 1e-6, 1 - 1e-6)
    before = action.atanh()
    density = -((before - loc) ** 2) / (2 * scale**2) - scale.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return (density - (1 - action**2).log()).sum(-1)


def chosen(values: NestedKey = "action_value", action: NestedKey = "action") -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        found = outputs[values].gather(-1, data[action].unsqueeze(-1)).squeeze(-1)
        return found.reshape(len(data), -1).sum(-1)

    return score


def expected_q(outputs: Outputs, data: TensorDictBase) -> Tensor:
    values = (outputs["action_value"].exp() * SUPPORT[:, None]).sum(-2)
    return values.gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)


def summed(*keys: NestedKey) -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        return torch.stack([outputs[key].reshape(len(data), -1).sum(-1) for key in keys]).sum(0)

    return score


def state_value(key: str = "state_value") -> tuple[Target, Callable]:
    return targets.state_value(key), lambda outputs, data: outputs[key].squeeze(-1)
