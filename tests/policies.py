"""The policies that the tests hook: each with its inputs and one inner site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import (
    MLP,
    ActorValueOperator,
    ConvNet,
    EGreedyModule,
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


@dataclass(frozen=True)
class Case:
    """A policy, a site inside it with its feature shape, and what it reads."""

    build: Callable[[], nn.Module]
    site: str
    features: tuple[int, ...] = (HIDDEN,)
    key: str = "observation"
    shape: tuple[int, ...] = (FEATURES,)

    def data(self, *batch: int) -> TensorDict:
        return TensorDict({self.key: torch.randn(*batch, *self.shape)}, batch_size=batch)


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
