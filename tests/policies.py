"""The policies that the tests hook: each with its inputs and one inner site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import (
    MLP,
    ActorValueOperator,
    ConvNet,
    EGreedyModule,
    GRUModule,
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)

FEATURES, ACTIONS, HIDDEN = 6, 4, 16


def mlp(outputs: int = ACTIONS, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    net = MLP(in_features=FEATURES, out_features=outputs, num_cells=[HIDDEN, HIDDEN], activation_class=activation)
    return nn.Sequential(*net)  # an MLP cannot be sliced, which the tests do


def categorical(activation: type[nn.Module] = nn.Tanh) -> ProbabilisticActor:
    net = TensorDictModule(mlp(activation=activation), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def one_hot() -> ProbabilisticActor:
    net = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)


def tanh_normal() -> ProbabilisticActor:
    net = nn.Sequential(mlp(2 * 2), NormalParamExtractor())
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)


def value() -> ValueOperator:
    return ValueOperator(mlp(1), in_keys=["observation"])


def actor_value() -> ActorValueOperator:
    common = TensorDictModule(nn.Linear(FEATURES, HIDDEN), in_keys=["observation"], out_keys=["hidden"])
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    actor = ProbabilisticActor(head, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    return ActorValueOperator(common, actor, ValueOperator(nn.Linear(HIDDEN, 1), in_keys=["hidden"]))


def q_value() -> TensorDictSequential:
    spec = CategoricalSpec(ACTIONS)
    actor = QValueActor(mlp(), in_keys=["observation"], spec=spec)
    return TensorDictSequential(actor, EGreedyModule(spec=spec, eps_init=0.5, eps_end=0.5))


def pixels() -> ProbabilisticActor:
    net = nn.Sequential(ConvNet(in_features=3, num_cells=[4, 4], kernel_sizes=3), nn.LazyLinear(ACTIONS))
    net(torch.zeros(1, 3, 8, 8))
    module = TensorDictModule(net, in_keys=["pixels"], out_keys=["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def inplace_relu() -> ProbabilisticActor:
    first, second = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    return actor(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), nn.Linear(HIDDEN, ACTIONS))


def batch_norm() -> ProbabilisticActor:
    """In train mode; its statistics are those of a few batches."""
    policy = actor(nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, ACTIONS))
    for _ in range(3):
        policy(TensorDict({"observation": torch.randn(20, FEATURES)}, batch_size=20))
    return policy


class Bytes(nn.Module):
    """Reads bytes as pixels between 0 and 1."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(torch.get_default_dtype()) / 255


def bytes_actor() -> ProbabilisticActor:
    return actor(Bytes(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(144, ACTIONS), in_key="pixels")


def multi_agent() -> ProbabilisticActor:
    """Three agents that share their weights; keys are nested."""
    agents = [("agents", "observation")], [("agents", "logits")]
    net = TensorDictModule(mlp(), in_keys=agents[0], out_keys=agents[1])
    return ProbabilisticActor(
        net,
        in_keys={"logits": ("agents", "logits")},
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )


class Pair(nn.Module):
    """Returns a tuple with a mapping in it, or its first part alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, HIDDEN)
        self.alone = False

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = self.linear(x).tanh()
        return hidden if self.alone else (hidden, {"norm": x.norm(dim=-1, keepdim=True)})


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(HIDDEN, ACTIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.pair(x)
        hidden, norm = (found, x.norm(dim=-1, keepdim=True)) if self.pair.alone else (found[0], found[1]["norm"])
        return self.head(hidden) / (1 + norm)


def recurrent() -> ProbabilisticActor:
    gru = GRUModule(input_size=FEATURES, hidden_size=HIDDEN, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    net = TensorDictSequential(gru, head)
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def actor(*layers: nn.Module, in_key: str = "observation") -> ProbabilisticActor:
    net = TensorDictModule(nn.Sequential(*layers), in_keys=[in_key], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


@dataclass(frozen=True)
class Case:
    """A policy, a site inside it with its feature shape, and what it reads."""

    build: Callable[[], nn.Module]
    site: str
    features: tuple[int, ...] = (HIDDEN,)
    key: NestedKey = "observation"
    shape: tuple[int, ...] = (FEATURES,)
    logits: NestedKey = "logits"
    state: tuple[int, ...] | None = None  # of a recurrent policy

    def data(self, *batch: int) -> TensorDict:
        value = torch.randn(*batch, *self.shape)
        if self.build is bytes_actor:
            value = torch.randint(0, 256, value.shape, dtype=torch.uint8)
        data = TensorDict({self.key: value}, batch_size=batch)
        if self.state is not None:
            data["recurrent_state"] = torch.randn(*batch, *self.state)
            data["is_init"] = torch.zeros(*batch, 1, dtype=torch.bool)
        return data


CASES = {
    "categorical": Case(categorical, "module.0.module.1"),
    "relu": Case(lambda: categorical(nn.ReLU), "module.0.module.1"),
    "one_hot": Case(one_hot, "module.0.module.1"),
    "tanh_normal": Case(tanh_normal, "module.0.module.0.1"),
    "value": Case(value, "module.1"),
    "actor_value": Case(actor_value, "module.0.module"),
    "q_value": Case(q_value, "module.0.module.0.module.1"),
    "pixels": Case(pixels, "module.0.module.0.1", features=(4, 6, 6), key="pixels", shape=(3, 8, 8)),
}

#: Networks with something that a method may stumble over.
ODD = {
    "inplace_relu": Case(inplace_relu, "module.0.module.0"),  # the next module overwrites what this one returns
    "batch_norm": Case(batch_norm, "module.0.module.1"),
    "batch_norm_eval": Case(lambda: batch_norm().eval(), "module.0.module.1"),
    "bytes": Case(bytes_actor, "module.0.module.2", features=(4, 6, 6), key="pixels", shape=(3, 8, 8)),
    "multi_agent": Case(
        multi_agent,
        "module.0.module.1",
        (3, HIDDEN),
        key=("agents", "observation"),
        shape=(3, FEATURES),
        logits=("agents", "logits"),
    ),
    "tuples": Case(lambda: actor(Tuples()), "module.0.module.0.pair"),
    "recurrent": Case(recurrent, "module.0.module.1.module", features=(ACTIONS,), state=(1, HIDDEN)),
}

POLICIES = {**CASES, **ODD}
