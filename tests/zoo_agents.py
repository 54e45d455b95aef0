"""Policies of the zoo for many agents, with shared and with separate parameters."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import Unbounded
from torchrl.modules import MultiAgentConvNet, MultiAgentMLP, ProbabilisticActor, QValueModule

from tests.policies import ACTIONS, FEATURES, HIDDEN
from tests.zoo_entry import AGENTS, OBSERVED, Entry, Outputs, index_log_prob


def agents(net: nn.Module) -> ProbabilisticActor:
    module = TensorDictModule(net, in_keys=[OBSERVED], out_keys=[("agents", "logits")])
    return ProbabilisticActor(
        module,
        in_keys={"logits": ("agents", "logits")},
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
    )


def agents_mlp(share: bool, central: bool = False, outputs: int = ACTIONS) -> MultiAgentMLP:
    return MultiAgentMLP(
        n_agent_inputs=FEATURES,
        n_agent_outputs=outputs,
        n_agents=AGENTS,
        centralized=central,
        share_params=share,
        num_cells=[HIDDEN],
        activation_class=nn.Tanh,
    )


def agents_layer(params: Any, layer: str, x: Tensor, separate: bool) -> Tensor:
    weight, bias = params[layer, "weight"], params[layer, "bias"]
    return torch.einsum("bni,noi->bno", x, weight) + bias if separate else x @ weight.T + bias


def agents_entry(share: bool, central: bool = False) -> Entry:
    def first(policy: Any, data: TensorDictBase) -> Tensor:
        x = data["agents", "observation"]
        if central:
            x = x.reshape(len(x), 1, -1).expand(-1, AGENTS, -1)
        return agents_layer(policy.module[0].module.params, "0", x, not share).tanh()

    def rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
        return {("agents", "logits"): agents_layer(policy.module[0].module.params, "2", hidden, not share)}

    return Entry(
        build=lambda: agents(agents_mlp(share, central)),
        site="module.0.module._empty_net.1",
        features=(AGENTS, HIDDEN),
        first=first,
        rest=rest,
        score=index_log_prob(("agents", "logits"), ("agents", "action")),
        observations={OBSERVED: Unbounded((AGENTS, FEATURES))},
        actions={("agents", "action"): CategoricalSpec(ACTIONS, shape=(AGENTS,))},
        explained=(OBSERVED,),
    )


def agents_q() -> TensorDictSequential:
    module = TensorDictModule(agents_mlp(False), in_keys=[OBSERVED], out_keys=[("agents", "action_value")])
    keys = [("agents", key) for key in ("action", "action_value", "chosen_action_value")]
    value = QValueModule(
        action_value_key=("agents", "action_value"),
        out_keys=keys,
        spec=None,
        action_space="categorical",
    )
    return TensorDictSequential(module, value)


def agents_conv(share: bool) -> Entry:
    def build() -> ProbabilisticActor:
        conv = MultiAgentConvNet(
            n_agents=AGENTS,
            centralized=False,
            share_params=share,
            in_features=2,
            num_cells=[4],
            kernel_sizes=3,
            strides=1,
        )
        return agents(nn.Sequential(conv, nn.Linear(64, ACTIONS)))

    def first(policy: Any, data: TensorDictBase) -> Tensor:
        x, params = data["agents", "observation"], policy.module[0].module[0].params
        maps = []
        for agent in range(AGENTS):
            weight, bias = (params["0", name] if share else params["0", name][agent] for name in ("weight", "bias"))
            maps.append(nn.functional.elu(nn.functional.conv2d(x[:, agent], weight, bias)))
        return torch.stack(maps, 1)

    return Entry(
        build=build,
        site="module.0.module.0._empty_net.1",
        features=(AGENTS, 4, 4, 4),
        first=first,
        rest=lambda p, h, d: {("agents", "logits"): p.module[0].module[1](h.flatten(-3))},
        score=index_log_prob(("agents", "logits"), ("agents", "action")),
        observations={OBSERVED: Unbounded((AGENTS, 2, 6, 6))},
        actions={("agents", "action"): CategoricalSpec(ACTIONS, shape=(AGENTS,))},
        explained=(OBSERVED,),
    )


SEPARATE = agents_entry(share=False)
