"""The policies that attributions are timed on: actors, a value and a Q-network, with a batch that each has acted on.

Beside each stands what somebody would write who knows it: over bare tensors, and through its own TensorDicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical, OneHotCategorical
from torchrl.modules import GRUModule, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator

from benchmarks.nets import CLASSES, FEATURES, FRAME, Impala, mlp
from tdhook_rl import targets
from tdhook_rl.adapters import from_module

__all__ = ["ACTORS", "ActorProblem"]

OBSERVATION = "observation"
HIDDEN = 64

#: From observations and the other entries of as many rows to one number for each row.
Score = Callable[[Tensor, TensorDict], Tensor]


@dataclass(frozen=True)
class ActorProblem:
    """A policy and a batch that it has acted on; what is explained is what it decided, or the value.

    Attributes:
        name: of the kind of policy.
        policy: the policy.
        data: observations, what the policy put out, and what it read beside.
        target: what is explained.
        bare: the same of bare tensors, ``(x, data) -> one number a row``, with the policy's own weights.
        through: the same through the policy's TensorDicts.
        is_chain: the policy is a chain of known layers, and draws from a known distribution if it draws.
        baseline: of integrated gradients.
    """

    name: str
    policy: TensorDictModuleBase
    data: TensorDict
    target: Any
    bare: Score
    through: Score
    is_chain: bool
    baseline: Tensor

    @property
    def x(self) -> Tensor:
        return self.data[OBSERVATION]


def _problem(
    name: str, policy: Any, batch: int, target: Any, bare: Score, through: Score, is_chain: bool = True, **entries: Any
) -> ActorProblem:
    x = entries.pop("x", None)
    x = torch.randn(batch, FEATURES) if x is None else x
    with torch.no_grad():
        data = policy(TensorDict({OBSERVATION: x, **entries}, batch_size=batch))
    return ActorProblem(name, policy, data, target, bare, through, is_chain, 0.1 * torch.randn_like(x))


def _log_prob_through(actor: Any, *reads: str) -> Score:
    def through(x: Tensor, data: TensorDict) -> Tensor:
        entries = {OBSERVATION: x} | {key: data[key] for key in reads}
        return actor.get_dist(TensorDict(entries, batch_size=x.shape[0])).log_prob(data["action"])

    return through


def categorical(batch: int) -> ActorProblem:
    net = mlp(3, HIDDEN, 1).net
    actor = ProbabilisticActor(_module(net, ["logits"]), in_keys=["logits"], distribution_class=Categorical)

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        return net(x).log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)

    return _problem("Categorical", actor, batch, targets.taken_action_log_prob(), bare, _log_prob_through(actor))


def one_hot(batch: int) -> ActorProblem:
    net = mlp(3, HIDDEN, 1).net
    actor = ProbabilisticActor(_module(net, ["logits"]), in_keys=["logits"], distribution_class=OneHotCategorical)

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        return (net(x).log_softmax(-1) * data["action"]).sum(-1)

    return _problem("OneHot", actor, batch, targets.taken_action_log_prob(), bare, _log_prob_through(actor))


def tanh_normal(batch: int) -> ActorProblem:
    body = mlp(3, HIDDEN, 1).net
    net = nn.Sequential(*body, NormalParamExtractor())
    actor = ProbabilisticActor(
        _module(net, ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0},
    )

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        loc, scale = net(x)
        bound = 1 - torch.finfo(x.dtype).resolution  # as TanhNormal keeps actions from the edge
        # What squashing adds, and the constant of the normal distribution, do not depend on x.
        drawn = data["action"].clamp(-bound, bound).atanh()
        return (-((drawn - loc) ** 2) / (2 * scale**2) - scale.log()).sum(-1)

    return _problem("TanhNormal", actor, batch, targets.taken_action_log_prob(), bare, _log_prob_through(actor))


def value(batch: int) -> ActorProblem:
    net = nn.Sequential(*mlp(3, HIDDEN, 1).net[:-1], nn.Linear(HIDDEN, 1))
    critic = ValueOperator(net, in_keys=[OBSERVATION])

    def through(x: Tensor, data: TensorDict) -> Tensor:
        return critic(TensorDict({OBSERVATION: x}, batch_size=x.shape[0]))["state_value"].squeeze(-1)

    return _problem("value", critic, batch, targets.state_value(), lambda x, data: net(x).squeeze(-1), through)


def q_network(batch: int) -> ActorProblem:
    net = mlp(3, HIDDEN, 1).net
    actor = QValueActor(net, in_keys=[OBSERVATION], action_space="one-hot")

    def through(x: Tensor, data: TensorDict) -> Tensor:
        found = actor(TensorDict({OBSERVATION: x}, batch_size=x.shape[0]))
        return (found["action_value"] * data["action"]).sum(-1)

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        return (net(x) * data["action"]).sum(-1)

    return _problem("Q", actor, batch, targets.chosen_q(), bare, through)


class Agent(nn.Module):
    """As in CleanRL's scripts."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.network, self.actor = net[:-1], net[-1]


def adapter(batch: int) -> ActorProblem:
    net = mlp(3, HIDDEN, 1).net
    actor = from_module(Agent(net), "actor", trunk="network")

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        return net(x).log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)

    return _problem("adapter", actor, batch, targets.taken_action_log_prob(), bare, _log_prob_through(actor))


def gru(batch: int) -> ActorProblem:
    torch.manual_seed(0)
    core = GRUModule(
        input_size=FEATURES,
        hidden_size=HIDDEN,
        in_keys=[OBSERVATION, "recurrent_state", "is_init"],
        out_keys=["embedding", ("next", "recurrent_state")],
    )
    head = nn.Linear(HIDDEN, CLASSES)
    nn.init.normal_(head.weight)
    trunk = TensorDictSequential(core, TensorDictModule(head, in_keys=["embedding"], out_keys=["logits"]))
    actor = ProbabilisticActor(trunk, in_keys=["logits"], distribution_class=Categorical)

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        # None of the rows is the first of an episode, where the state would be zero.
        embedding, _ = core.gru(x.unsqueeze(1), data["recurrent_state"].transpose(0, 1).contiguous())
        logits = head(embedding.squeeze(1))
        return logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)

    return _problem(
        "GRU", actor, batch, targets.taken_action_log_prob(), bare,
        _log_prob_through(actor, "recurrent_state", "is_init"), is_chain=False,
        recurrent_state=torch.randn(batch, 1, HIDDEN), is_init=torch.zeros(batch, 1, dtype=torch.bool),
    )  # fmt: skip


def impala(batch: int) -> ActorProblem:
    torch.manual_seed(0)
    net = Impala()
    actor = ProbabilisticActor(_module(net, ["logits"]), in_keys=["logits"], distribution_class=Categorical)

    def bare(x: Tensor, data: TensorDict) -> Tensor:
        return net(x).log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)

    return _problem(
        "IMPALA", actor, batch, targets.taken_action_log_prob(), bare, _log_prob_through(actor), is_chain=False,
        x=torch.rand(batch, *FRAME),
    )  # fmt: skip


def _module(net: nn.Module, out_keys: list[str]) -> TensorDictModule:
    return TensorDictModule(net, in_keys=[OBSERVATION], out_keys=out_keys)


#: By name, from the rows of a batch to a policy and its batch.
ACTORS: dict[str, Callable[[int], ActorProblem]] = {
    "Categorical": categorical,
    "OneHot": one_hot,
    "TanhNormal": tanh_normal,
    "value": value,
    "Q": q_network,
    "adapter": adapter,
    "GRU": gru,
    "IMPALA": impala,
}
