"""Feed-forward policies of the zoo, and actors with critics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import Unbounded
from torchrl.modules import (
    Actor,
    ActorCriticOperator,
    ActorValueOperator,
    AdditiveGaussianModule,
    ConvNet,
    DistributionalQValueActor,
    EGreedyModule,
    MaskedCategorical,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueActor,
    TanhModule,
    ValueOperator,
)

from tests.policies import ACTIONS, FEATURES, HIDDEN, mlp
from tests.zoo_entry import ATOMS, CONTINUOUS, CONTROLS, SUPPORT, Entry, Outputs, index_log_prob


def layers(net: Callable[[Any], nn.Sequential], cut: int = 2, key: NestedKey = "observation") -> Callable:
    return lambda policy, data: net(policy)[:cut](data[key])


def into(key: NestedKey, net: Callable[[Any], nn.Sequential], cut: int = 2) -> Callable:
    return lambda policy, hidden, data: {key: net(policy)[cut:](hidden)}


def first_module(policy: Any) -> nn.Sequential:
    return policy.module[0].module


def own_module(policy: Any) -> nn.Sequential:
    return policy.module


def q_module(policy: Any) -> nn.Sequential:
    return policy.module[0].module[0].module


def deterministic() -> Actor:
    return Actor(mlp(CONTROLS), in_keys=["observation"])


def masked() -> ProbabilisticActor:
    net = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net,
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )


def normal_params(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    net = policy.module[0].module
    loc, scale = net[1](net[0][2:](hidden))
    return {"loc": loc, "scale": scale}


def critic() -> ValueOperator:
    return ValueOperator(mlp(1), in_keys=["observation"])


def q_value() -> QValueActor:
    return QValueActor(mlp(), in_keys=["observation"], spec=CategoricalSpec(ACTIONS))


def q_value_greedy() -> TensorDictSequential:
    spec = CategoricalSpec(ACTIONS)
    return TensorDictSequential(q_value(), EGreedyModule(spec=spec, eps_init=0.5, eps_end=0.5))


class Atoms(nn.Module):
    """Logits of the atoms of each action's return, ``(atoms, actions)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (ATOMS, ACTIONS))


def distributional() -> DistributionalQValueActor:
    net = nn.Sequential(*mlp(ATOMS * ACTIONS), Atoms())
    return DistributionalQValueActor(net, in_keys=["observation"], support=SUPPORT, spec=CategoricalSpec(ACTIONS))


def atom_values(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {"action_value": policy.module[0].module[2:](hidden).log_softmax(-2)}


def gaussian_noise() -> TensorDictSequential:
    spec = CONTINUOUS["action"]
    net = TensorDictModule(mlp(CONTROLS), in_keys=["observation"], out_keys=["param"])
    return TensorDictSequential(
        net,
        TanhModule(in_keys=["param"], out_keys=["action"], spec=spec),
        AdditiveGaussianModule(spec=spec, sigma_init=0.3, sigma_end=0.3),
    )


def ou_noise() -> TensorDictSequential:
    return TensorDictSequential(deterministic(), OrnsteinUhlenbeckProcessModule(spec=CONTINUOUS["action"].clone()))


class Custom(TensorDictModuleBase):
    """A policy with a forward of its own, which samples by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, ACTIONS)
        self.in_keys, self.out_keys = ["observation"], ["logits", "action"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits = self.head(self.body(tensordict["observation"]).tanh())
        tensordict.set("logits", logits)
        return tensordict.set("action", Categorical(logits=logits).sample())


class Plain(nn.Module):
    """A policy that knows nothing of TensorDicts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(CONTROLS)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation).tanh()


def nested() -> ProbabilisticActor:
    net = TensorDictModule(mlp(), in_keys=[("sense", "vector")], out_keys=[("mind", "logits")])
    return ProbabilisticActor(
        net,
        in_keys={"logits": ("mind", "logits")},
        out_keys=[("act", "move")],
        distribution_class=Categorical,
        return_log_prob=True,
    )


class Scaled(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.get_default_dtype()) / 255


def pixels(scaled: bool) -> Callable[[], ProbabilisticActor]:
    def build() -> ProbabilisticActor:
        conv = ConvNet(in_features=2, num_cells=[4, 4], kernel_sizes=3)
        net = nn.Sequential(Scaled() if scaled else nn.Identity(), conv, nn.Linear(64, ACTIONS))
        module = TensorDictModule(net, in_keys=["pixels"], out_keys=["logits"])
        return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)

    return build


def conv_layers(policy: Any) -> nn.Sequential:
    return nn.Sequential(*policy.module[0].module[1])


def pixel_entry(scaled: bool) -> Entry:
    dtype = torch.uint8 if scaled else torch.float32
    return Entry(
        build=pixels(scaled),
        site="module.0.module.1.1",
        features=(4, 6, 6),
        first=lambda p, d: conv_layers(p)[:2](p.module[0].module[0](d["pixels"])),
        rest=lambda p, h, d: {"logits": p.module[0].module[2](conv_layers(p)[2:](h))},
        score=index_log_prob(),
        observations={"pixels": Unbounded((2, 8, 8), dtype=dtype)},
        explained=("pixels",),
    )


# ---------------------------------------------------------------------- actors with critics


def actor_value() -> ActorValueOperator:
    common = TensorDictModule(nn.Linear(FEATURES, HIDDEN), in_keys=["observation"], out_keys=["hidden"])
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    actor = ProbabilisticActor(head, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    return ActorValueOperator(common, actor, ValueOperator(nn.Linear(HIDDEN, 1), in_keys=["hidden"]))


class Judge(nn.Module):
    """The value of a state and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(HIDDEN + ACTIONS, 1)

    def forward(self, hidden: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([hidden, action.to(hidden.dtype)], -1)).tanh()


def actor_critic() -> ActorCriticOperator:
    common = TensorDictModule(nn.Linear(FEATURES, HIDDEN), in_keys=["observation"], out_keys=["hidden"])
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    actor = ProbabilisticActor(head, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
    judge = ValueOperator(Judge(), in_keys=["hidden", "action"], out_keys=["state_action_value"])
    return ActorCriticOperator(common, actor, judge)


def linear(policy: Any, data: TensorDictBase) -> Tensor:
    return policy.module[0].module(data["observation"])


def trunk_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[1].module[0].module(hidden),
        "state_value": policy.module[2].module(hidden),
    }


def critic_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[1].module[0].module(hidden),
        "state_action_value": policy.module[2].module(hidden, data["action"]),
    }


def head_rest(key: str) -> Callable:
    return lambda policy, hidden, data: {key: policy.module[1].module(hidden)}


def wrapper_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[0].module[0].module[2:](hidden),
        "state_value": policy.module[1].module(data["observation"]),
    }
