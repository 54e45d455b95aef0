"""TorchRL losses with small networks: each built from nets, so that a test can put steered nets in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Bounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import (
    Actor,
    AdditiveGaussianModule,
    DistributionalQValueActor,
    EGreedyModule,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DDPGLoss,
    DiscreteSACLoss,
    DistributionalDQNLoss,
    DQNLoss,
    KLPENPPOLoss,
    LossModule,
    ReinforceLoss,
    SACLoss,
    TD3Loss,
)

from tests.mock_env import MockEnv
from tests.policies import ACTIONS, FEATURES, HIDDEN, mlp
from tests.zoo_entry import ATOMS, CONTINUOUS, CONTROLS, DISCRETE, SUPPORT, VECTOR

__all__ = ["LOSSES", "LossCase", "Modules", "Nets"]

Nets = Mapping[str, nn.Sequential]
Modules = dict[str, TensorDictModuleBase]


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """A loss and what it needs.

    Args:
        nets: makes the nets, by the name of the module that they are part of; the first acts.
        modules: makes the modules around them.
        sites: for each module the path of the first activation of its net.
        loss: makes the loss of the modules.
        explore: the policy that collects, made from the acting module.
        continuous: the actions of the environment.
        advantage: the loss reads an advantage.
    """

    nets: Callable[[], Nets]
    modules: Callable[[Nets], Modules]
    sites: Mapping[str, str]
    loss: Callable[[Modules], LossModule]
    explore: Callable[[Any], Any] = lambda actor: actor
    continuous: bool = False
    advantage: bool = False

    def build(self, seed: int = 0) -> tuple[Nets, Modules]:
        torch.manual_seed(seed)
        nets = self.nets()
        return nets, self.modules(nets)

    def env(self) -> MockEnv:
        return MockEnv(VECTOR, CONTINUOUS if self.continuous else DISCRETE, batch_size=(4,), seed=7)


class OnBoth(nn.Module):
    """A net that reads the observation and the action."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action], -1))


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES + CONTROLS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def categorical(net: nn.Sequential) -> ProbabilisticActor:
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def tanh_normal(net: nn.Sequential) -> ProbabilisticActor:
    module = TensorDictModule(nn.Sequential(net, NormalParamExtractor()), ["observation"], ["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        spec=CONTINUOUS["action"],
    )


def on_policy(loss: type[LossModule]) -> LossCase:
    def modules(nets: Nets) -> Modules:
        critic = ValueOperator(nets["critic"], in_keys=["observation"])
        return {"actor": categorical(nets["actor"]), "critic": critic}

    return LossCase(
        nets=lambda: {"actor": mlp(), "critic": mlp(1)},
        modules=modules,
        sites={"actor": "module.0.module.1", "critic": "module.1"},
        loss=lambda made: loss(made["actor"], made["critic"]),
        advantage=True,
    )


def judged(actor: Callable[[nn.Sequential], Any], outputs: int, site: str, loss: Callable) -> LossCase:
    def modules(nets: Nets) -> Modules:
        critic = ValueOperator(OnBoth(nets["critic"]), in_keys=["observation", "action"])
        return {"actor": actor(nets["actor"]), "critic": critic}

    return LossCase(
        nets=lambda: {"actor": mlp(outputs), "critic": wide()},
        modules=modules,
        sites={"actor": site, "critic": "module.net.1"},
        loss=loss,
        continuous=True,
    )


def noisy(actor: Any) -> TensorDictSequential:
    return TensorDictSequential(actor, AdditiveGaussianModule(spec=CONTINUOUS["action"], sigma_init=0.2, sigma_end=0.2))


def with_noise(case: LossCase) -> LossCase:
    return LossCase(**{**vars(case), "explore": noisy})


def greedy(actor: Any) -> TensorDictSequential:
    return TensorDictSequential(actor, EGreedyModule(spec=CategoricalSpec(ACTIONS), eps_init=0.3, eps_end=0.3))


class Squashed(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation).tanh()


def deterministic(net: nn.Sequential) -> Actor:
    return Actor(Squashed(net), in_keys=["observation"], spec=Bounded(-1.0, 1.0, shape=(CONTROLS,)))


def discrete_sac(nets: Nets) -> Modules:
    critic = TensorDictModule(nets["critic"], in_keys=["observation"], out_keys=["action_value"])
    return {"actor": categorical(nets["actor"]), "critic": critic}


def q_actor(nets: Nets) -> Modules:
    return {"actor": QValueActor(nets["actor"], in_keys=["observation"], spec=CategoricalSpec(ACTIONS))}


def atoms_actor(nets: Nets) -> Modules:
    net = nn.Sequential(nets["actor"], nn.Unflatten(-1, (ATOMS, ACTIONS)))
    spec = CategoricalSpec(ACTIONS)
    return {"actor": DistributionalQValueActor(net, in_keys=["observation"], support=SUPPORT, spec=spec)}


LOSSES: dict[str, LossCase] = {
    "ppo_clip": on_policy(ClipPPOLoss),
    "ppo_kl": on_policy(KLPENPPOLoss),
    "a2c": on_policy(A2CLoss),
    "reinforce": on_policy(ReinforceLoss),
    "sac": judged(
        tanh_normal,
        2 * CONTROLS,
        "module.0.module.0.1",
        lambda made: SACLoss(made["actor"], made["critic"], num_qvalue_nets=2),
    ),
    "discrete_sac": LossCase(
        nets=lambda: {"actor": mlp(), "critic": mlp()},
        modules=discrete_sac,
        sites={"actor": "module.0.module.1", "critic": "module.1"},
        loss=lambda made: DiscreteSACLoss(
            made["actor"], made["critic"], action_space="categorical", num_actions=ACTIONS, num_qvalue_nets=2
        ),
    ),
    "td3": with_noise(
        judged(
            deterministic,
            CONTROLS,
            "module.net.1",
            lambda made: TD3Loss(made["actor"], made["critic"], action_spec=CONTINUOUS["action"], num_qvalue_nets=2),
        )
    ),
    "ddpg": with_noise(
        judged(deterministic, CONTROLS, "module.net.1", lambda made: DDPGLoss(made["actor"], made["critic"]))
    ),
    "dqn": LossCase(
        nets=lambda: {"actor": mlp()},
        modules=q_actor,
        sites={"actor": "module.0.module.1"},
        loss=lambda made: DQNLoss(made["actor"], delay_value=True, double_dqn=True),
        explore=greedy,
    ),
    "distributional_dqn": LossCase(
        nets=lambda: {"actor": mlp(ATOMS * ACTIONS)},
        modules=atoms_actor,
        sites={"actor": "module.0.module.0.1"},
        loss=lambda made: DistributionalDQNLoss(made["actor"], gamma=0.9, delay_value=True),
        explore=greedy,
    ),
}
