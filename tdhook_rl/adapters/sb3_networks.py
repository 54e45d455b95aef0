"""The networks of a Stable-Baselines3 policy, put together as TorchRL has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import distributions as D
from torch import nn
from torchrl.modules import (
    ActorCriticWrapper,
    ActorValueOperator,
    LSTMModule,
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    ValueOperator,
)

from tdhook_rl.adapters.actions import StateDependentNoise, ToBounds, TwoHeads, WithScale
from tdhook_rl.adapters.distributions import USUAL_EPSILON, Bits, DiagonalNormal, MultiCategorical, SquashedNormal
from tdhook_rl.adapters.observations import Branch, Features, Observation, Rows, Through, dtype_of
from tdhook_rl.adapters.sb3_reading import Reading
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.internals.sb3_names import OWN_WAY
from tdhook_rl.policies.tying import tied_clone

Piece = Literal["actor", "value", "actor_value"]

#: The action as Stable-Baselines3 draws and stores it, before it is brought into the bounds of the environment.
RAW = "raw_action"
FEATURES = "features"
#: Where TorchRL's environments say which actions there are.
MASK = "action_mask"
LIBRARIES = ("stable_baselines3.", "sb3_contrib.")
#: Limits of the logarithm of the scale in SAC.
_LIMITS = (-20, 2)


# ---------------------------------------------------------------------- PPO, A2C


def actor_critic(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    if hasattr(policy, "lstm_actor"):
        return recurrent_actor(policy, part, reading)
    shared = policy.share_features_extractor
    names = ["features_extractor"] * 2 if shared else ["pi_features_extractor", "vf_features_extractor"]
    actor = {names[0]: policy.pi_features_extractor, **_latent(policy.mlp_extractor, "policy_net", "forward_actor")}
    value = {names[1]: policy.vf_features_extractor, **_latent(policy.mlp_extractor, "value_net", "forward_critic")}
    value["value_net"] = policy.value_net
    heads, draw = _draw(policy, reading)
    actor |= heads
    if part == "actor":
        return draw(_chain(reading.observation(), actor), reading.keys)
    if part == "value":
        return ValueOperator(_chain(reading.observation(), value), in_keys=reading.keys)
    if not shared:
        return ActorCriticWrapper(
            draw(_chain(reading.observation(), actor), reading.keys),
            ValueOperator(_chain(reading.observation(), value), in_keys=reading.keys),
        )
    common = _chain(reading.observation(), {names[0]: actor.pop(names[0])})
    del value[names[1]]
    return ActorValueOperator(
        TensorDictModule(common, in_keys=reading.keys, out_keys=[FEATURES]),
        draw(_chain(Features(), actor), [FEATURES]),
        ValueOperator(_chain(Features(), value), in_keys=[FEATURES]),
    )


def recurrent_actor(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    """Of RecurrentPPO, over TorchRL's module for an LSTM, which keeps its states in the data."""
    if part != "actor":
        raise InputError(
            f"part={part!r} of a recurrent agent: only its actor can be had, because its critic has a memory of its own"
        )
    lstm = tied_clone(policy.lstm_actor)
    lstm.batch_first = True  # how it is called, not what it computes
    heads, draw = _draw(policy, reading)
    layers = {**_latent(policy.mlp_extractor, "policy_net", "forward_actor"), **heads}
    common = _chain(reading.observation(), {"features_extractor": policy.pi_features_extractor})
    memory = LSTMModule(lstm=lstm, in_key=FEATURES, out_key="latent")
    before = [TensorDictModule(common, in_keys=reading.keys, out_keys=[FEATURES]), memory]
    return draw(_chain(Features(), layers), ["latent"], before)


def _latent(extractor: Any, name: str, method: str) -> dict[str, nn.Module]:
    """The hidden layers of actor or critic: of the usual extractor only its own, of another by its method."""
    from stable_baselines3.common.torch_layers import MlpExtractor

    usual = type(extractor) is MlpExtractor
    return {"mlp_extractor": Branch(**{name: getattr(extractor, name)}) if usual else Through(extractor, method)}


def _draw(policy: Any, reading: Reading) -> tuple[dict[str, nn.Module], Any]:
    """The layers that give the parameters of the action distribution, and what makes an actor of a net with these."""
    from stable_baselines3.common import distributions as sb3

    drawn, net = policy.action_dist, policy.action_net
    require_usual(drawn)
    if isinstance(drawn, sb3.CategoricalDistribution):
        chosen = D.Categorical if reading.categorical else OneHotCategorical
        return {"action_net": net}, partial(_discrete, kind=chosen)
    if isinstance(drawn, sb3.MultiCategoricalDistribution):
        sizes = {"sizes": tuple(int(size) for size in drawn.action_dims)}
        if not reading.categorical:
            raise InputError(
                f"this agent makes {len(sizes['sizes'])} choices at once (MultiDiscrete), which are given as indices: "
                "leave categorical_action_encoding=True, and give it to GymEnv"
            )
        return {"action_net": net}, partial(_discrete, kind=MultiCategorical, kwargs=sizes)
    if isinstance(drawn, sb3.BernoulliDistribution):
        return {"action_net": net}, partial(_discrete, kind=Bits)
    if type(drawn).__name__ == "MaskableCategoricalDistribution":
        chosen = MaskedCategorical if reading.categorical else MaskedOneHotCategorical
        return {"action_net": net}, partial(_discrete, kind=chosen, mask=MASK)
    bounds = ToBounds(policy.action_space.low, policy.action_space.high, scaled=policy.squash_output)
    if isinstance(drawn, sb3.StateDependentNoiseDistribution):
        heads: dict[str, nn.Module] = {"heads": StateDependentNoise(net, policy.log_std, drawn)}
        squashed = drawn.bijector is not None
    else:
        heads = {"action_net": net, "scale": WithScale(policy.log_std)}
        squashed = isinstance(drawn, sb3.SquashedDiagGaussianDistribution)
    if squashed:
        return heads, partial(_continuous, kind=SquashedNormal, kwargs=_epsilon_of(drawn), bounds=bounds)
    return heads, partial(_continuous, kind=DiagonalNormal, bounds=bounds)


def _epsilon_of(drawn: Any) -> dict[str, Any] | None:
    """What keeps the density of a squashed action finite, where it is not the usual number."""
    return None if drawn.epsilon == USUAL_EPSILON else {"epsilon": drawn.epsilon}


def _discrete(
    net: nn.Module,
    keys: list[NestedKey],
    before: Sequence[Any] = (),
    *,
    kind: Any,
    kwargs: dict[str, Any] | None = None,
    mask: str | None = None,
) -> ProbabilisticActor:
    return ProbabilisticActor(
        _after(before, TensorDictModule(net, in_keys=keys, out_keys=["logits"])),
        in_keys={"logits": "logits", "mask": mask} if mask else ["logits"],
        distribution_class=kind,
        distribution_kwargs=kwargs,
        return_log_prob=True,
    )


def _continuous(
    net: nn.Module,
    keys: list[NestedKey],
    before: Sequence[Any] = (),
    *,
    kind: Any,
    bounds: ToBounds,
    kwargs: dict[str, Any] | None = None,
) -> TensorDictSequential:
    actor = ProbabilisticActor(
        _after(before, TensorDictModule(net, in_keys=keys, out_keys=["loc", "scale"])),
        in_keys=["loc", "scale"],
        out_keys=[RAW],
        distribution_class=kind,
        distribution_kwargs=kwargs,
        return_log_prob=True,
        log_prob_key="action_log_prob",
    )
    return TensorDictSequential(actor, TensorDictModule(bounds, in_keys=[RAW], out_keys=["action"]))


def _after(before: Sequence[Any], last: TensorDictModule) -> TensorDictModuleBase:
    return TensorDictSequential(*before, last) if before else last


# ---------------------------------------------------------------------- DQN


def q_network(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    if part != "actor":
        raise InputError(
            f"part={part!r} of a DQN: its one network gives the values of all actions, which the actor writes as "
            "'action_value', and that of its choice as 'chosen_action_value'; targets.chosen_q() explains it"
        )
    net = policy.q_net
    require_usual(net)
    layers = {"features_extractor": net.features_extractor, "q_net": net.q_net}
    return QValueActor(
        _chain(reading.observation(), layers),
        in_keys=reading.keys,
        action_space="categorical" if reading.categorical else "one_hot",
    )


# ---------------------------------------------------------------------- SAC, TD3, DDPG


def actor_of_actions(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    actor = _actor_head(policy.actor, reading)
    if part == "actor":
        return actor
    critic = policy.critic
    require_usual(critic)
    names = ["state_action_value", *(f"state_action_value_{index}" for index in range(1, len(critic.q_networks)))]
    net = Critic(reading.observation(), critic.features_extractor, critic.q_networks)
    value = ValueOperator(net, in_keys=[*reading.keys, RAW], out_keys=names)
    return value if part == "value" else ActorCriticWrapper(actor, value)


def _actor_head(actor: Any, reading: Reading) -> TensorDictSequential:
    require_usual(actor)
    bounds = ToBounds(actor.action_space.low, actor.action_space.high, scaled=True)
    layers: dict[str, nn.Module] = {"features_extractor": actor.features_extractor}
    if not hasattr(actor, "latent_pi"):  # TD3's, which draws nothing
        net = _chain(reading.observation(), {**layers, "mu": actor.mu})
        return TensorDictSequential(
            TensorDictModule(net, in_keys=reading.keys, out_keys=[RAW]),
            TensorDictModule(bounds, in_keys=[RAW], out_keys=["action"]),
        )
    layers["latent_pi"] = actor.latent_pi
    drawn = actor.action_dist
    require_usual(drawn, "SquashedDiagGaussianDistribution", "StateDependentNoiseDistribution")
    if actor.use_sde:
        layers["heads"] = StateDependentNoise(actor.mu, actor.log_std, drawn)
    else:
        layers["heads"] = TwoHeads(actor.mu, actor.log_std, _LIMITS)
    net = _chain(reading.observation(), layers)
    return _continuous(net, reading.keys, kind=SquashedNormal, kwargs=_epsilon_of(drawn), bounds=bounds)


class Critic(nn.Module):
    """The critics of SAC and TD3, of an observation and an action between -1 and 1."""

    writes_nothing = True

    flat_rows = True

    def __init__(self, observation: Observation, features_extractor: nn.Module, networks: list[nn.Module]) -> None:
        super().__init__()
        self.observation = observation
        self.features_extractor = features_extractor
        self.count = len(networks)
        for index, one in enumerate(networks):
            self.add_module(f"qf{index}", one)

    def forward(self, *values: Any) -> Any:
        *observed, action = values
        batch = self.observation.batch_of(*observed)
        features = self.features_extractor(self.observation(*observed, dtype=dtype_of(self)))
        read = torch.cat([features, action.reshape(-1, action.shape[-1])], 1)
        found = tuple(self._modules[f"qf{index}"](read).reshape(*batch, 1) for index in range(self.count))  # type: ignore[misc]
        return found if len(found) > 1 else found[0]


def _chain(first: nn.Module, layers: Mapping[str, nn.Module]) -> Rows:
    return Rows(OrderedDict({"observation": first, **{name: _known(one) for name, one in layers.items()}}))


def _known(module: nn.Module) -> nn.Module:
    """What only flattens, as a module of which that is known; any other as it is."""
    from stable_baselines3.common.torch_layers import FlattenExtractor

    usual = type(module) is FlattenExtractor and "forward" not in vars(module)
    return Branch(flatten=module.flatten) if usual else module


def require_usual(one: Any, *kinds: str) -> None:
    """Refuse classes that override what the numbers come from, and those that are of another kind.

    Args:
        one: a policy, a network, or an action distribution.
        kinds: the classes of Stable-Baselines3 that it may be of; all that are known unless given.
    """
    kind = type(one)
    known = kinds or tuple(OWN_WAY)
    own = next((one for one in kind.__mro__ if one.__module__.startswith(LIBRARIES) and one.__name__ in OWN_WAY), None)
    remedy = "put the pieces together with tdhook_rl.adapters.from_module"
    if own is None or own.__name__ not in known:
        expected = f", and here it is {' or '.join(kinds)}" if kinds else ""
        raise PreparationError(
            f"{kind.__name__} is none of what from_sb3 knows of Stable-Baselines3{expected}: {remedy}"
        )
    names = [name for name in OWN_WAY[own.__name__] if hasattr(own, name)]
    changed = [name for name in names if getattr(kind, name) is not getattr(own, name)]
    changed += [name for name in names if name in vars(one)]
    if changed:
        raise PreparationError(
            f"{kind.__name__} computes in a way of its own ({', '.join(changed)}), which from_sb3 would leave out: "
            f"{remedy}"
        )
