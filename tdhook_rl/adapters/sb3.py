"""Agents of Stable-Baselines3 as TorchRL policies over the same tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import distributions as D
from torch import nn
from torchrl.modules import (
    ActorCriticWrapper,
    ActorValueOperator,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    ValueOperator,
)

from tdhook_rl.adapters.actions import StateDependentNoise, ToBounds, TwoHeads, WithScale
from tdhook_rl.adapters.distributions import Bits, DiagonalNormal, MultiCategorical, SquashedNormal
from tdhook_rl.adapters.normalisation import normalisers
from tdhook_rl.adapters.observations import Branch, Features, Observation, Part, Rows, Through
from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, PreparationError, warn
from tdhook_rl.internals.sb3_names import OWN_WAY, kept_as_given
from tdhook_rl.policies.tying import tied_clone

Piece = Literal["actor", "value", "actor_value"]
Keys: TypeAlias = NestedKey | Mapping[str, NestedKey]

#: The action as Stable-Baselines3 draws and stores it, before it is brought into the bounds of the environment.
RAW = "raw_action"
FEATURES = "features"
#: Limits of the logarithm of the scale in SAC.
_LIMITS = (-20, 2)


@checked
def from_sb3(
    model: Any,
    part: Piece = "actor",
    *,
    normalize: Any = None,
    in_keys: Keys | None = None,
    categorical_action_encoding: bool = True,
) -> TensorDictModuleBase:
    """The policy of a Stable-Baselines3 agent as a TorchRL policy, over the agent's own tensors.

    PPO, A2C, DQN, SAC, TD3 and DDPG, with vectors, pictures or dictionaries as observations. The network's own modules
    run (copies of them that hold the same parameters, in evaluation mode, under the paths that they have there):
    whoever trains the agent on trains this policy, and nothing of the agent is touched. Preparing the observation
    (scaled pictures, one-hot indices, channels first) and bringing the action into its bounds belong to the policy.

    Where not sampled, the action is that of ``model.predict(observation, deterministic=True)``, bit for bit; so is the
    value that of ``predict_values``. A continuous action is also written as ``"raw_action"``, as Stable-Baselines3
    stores it: unclipped (PPO, A2C) or between -1 and 1 (SAC, TD3). It is what is drawn, so ``"action_log_prob"`` is of
    it, as in ``evaluate_actions``.

    Args:
        model: an algorithm, or its policy. Of a saved one: ``from_sb3(PPO.load("agent.zip"))``; loading unpickles, so
            only load files that you trust.
        part: ``"actor"``; ``"value"``, which writes ``"state_value"``, and for SAC and TD3 ``"state_action_value"`` (of
            the first critic; of the second ``"state_action_value_1"``) from the observation and ``"raw_action"``; or
            ``"actor_value"``: one module with both, in which features that both use are computed once.
        normalize: the ``VecNormalize`` that the agent was trained in, where the observations come as the environment
            gives them; ``False`` where they come normalised. Its statistics are read as they are when the policy runs.
        in_keys: where the observation is: ``"observation"``; of dictionaries the keys by their names, unless given.
        categorical_action_encoding: as of TorchRL's ``GymEnv``: discrete actions and observations are indices, or
            one-hot (which is ``GymEnv``'s default).

    Returns:
        a ``ProbabilisticActor`` (discrete PPO and A2C), a sequence of one and what brings actions into bounds, a
        ``QValueActor`` (DQN), or a deterministic sequence (TD3); a ``ValueOperator``; an ``ActorValueOperator`` or
        ``ActorCriticWrapper``.

    Raises:
        PreparationError: for a policy whose class computes in a way of its own, or with a memory.
        InputError: for what is no agent of Stable-Baselines3, or for arguments that do not fit it.

    Example:
        >>> import gymnasium, torch
        >>> from stable_baselines3 import PPO
        >>> from torchrl.envs import GymEnv
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.adapters import from_sb3
        >>> agent = PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
        >>> actor = from_sb3(agent)
        >>> env = GymEnv("CartPole-v1", categorical_action_encoding=True)
        >>> with Saliency().prepare(actor) as policy:
        ...     data = policy.annotate(env.rollout(10, policy, break_when_any_done=False))
        >>> data["attr", "observation"].shape
        torch.Size([10, 4])
        >>> expected, _ = agent.predict(data["observation"].numpy(), deterministic=True)
        >>> bool((actor(data)["action"].numpy() == expected).all())
        True
    """
    policy = _policy_of(model)
    _warn_of_forgotten(model, normalize)
    reading = Reading(policy, normalize, in_keys, categorical_action_encoding)
    kind = _kind_of(policy)
    if kind == "ActorCriticPolicy":
        built = _actor_critic(policy, part, reading)
    elif kind == "DQNPolicy":
        built = _q_network(policy, part, reading)
    else:
        built = _actor_of_actions(policy, part, reading)
    # Copies of the modules hold the same tensors, but not the mode: training switches it back and forth.
    return tied_clone(built).eval()


class Reading:
    """How the networks of a policy read observations."""

    def __init__(self, policy: Any, normalize: Any, in_keys: Keys | None, categorical: bool) -> None:
        from gymnasium import spaces

        self.policy, self.categorical = policy, categorical
        space = policy.observation_space
        entries = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self.parts = {name: self._part(one, name or "observation") for name, one in entries.items()}
        self.keys = self._keys(in_keys)
        self.normalise = {} if normalize is None or normalize is False else normalisers(
            normalize, {name: part.shape for name, part in self.parts.items()}
        )  # fmt: skip

    def observation(self) -> Observation:
        return Observation(self.parts, self.normalise)

    def _part(self, space: Any, name: str) -> Part:
        from gymnasium import spaces
        from stable_baselines3.common.preprocessing import is_image_space

        if isinstance(space, spaces.Discrete):
            return Part((), name, sizes=(int(space.n),), one_hot=not self.categorical)
        if isinstance(space, spaces.MultiDiscrete):
            sizes = tuple(int(size) for size in space.nvec)
            return Part((len(sizes),), name, sizes=sizes, one_hot=not self.categorical)
        if isinstance(space, spaces.Box | spaces.MultiBinary):
            return Part(tuple(space.shape), name, image=self.policy.normalize_images and is_image_space(space))
        raise InputError(f"an observation of {space} is none that policies of Stable-Baselines3 read")

    def _keys(self, in_keys: Keys | None) -> list[NestedKey]:
        if "" in self.parts:
            if isinstance(in_keys, Mapping):
                raise InputError(f"this policy reads one observation: in_keys= is its key, not {dict(in_keys)}")
            return ["observation" if in_keys is None else in_keys]
        given = {name: name for name in self.parts} if in_keys is None else in_keys
        if not isinstance(given, Mapping) or set(given) != set(self.parts):
            raise InputError(
                f"this policy reads {', '.join(map(repr, self.parts))}: in_keys= has a key for each, by name; found "
                f"{given!r}"
            )
        return [given[name] for name in self.parts]


# ---------------------------------------------------------------------- PPO, A2C


def _actor_critic(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
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


def _latent(extractor: Any, name: str, method: str) -> dict[str, nn.Module]:
    """The hidden layers of actor or critic: of the usual extractor only its own, of another by its method."""
    from stable_baselines3.common.torch_layers import MlpExtractor

    usual = type(extractor) is MlpExtractor
    return {"mlp_extractor": Branch(**{name: getattr(extractor, name)}) if usual else Through(extractor, method)}


def _draw(policy: Any, reading: Reading) -> tuple[dict[str, nn.Module], Any]:
    """The layers that give the parameters of the action distribution, and what makes an actor of a net with these."""
    from stable_baselines3.common import distributions as sb3

    drawn, net = policy.action_dist, policy.action_net
    if isinstance(drawn, sb3.CategoricalDistribution):
        chosen = D.Categorical if reading.categorical else OneHotCategorical
        return {"action_net": net}, lambda rows, keys: _discrete(rows, keys, chosen)
    if isinstance(drawn, sb3.MultiCategoricalDistribution):
        sizes = {"sizes": tuple(int(size) for size in drawn.action_dims)}
        if not reading.categorical:
            raise InputError(
                f"this agent makes {len(sizes['sizes'])} choices at once (MultiDiscrete), which are given as indices: "
                "leave categorical_action_encoding=True, and give it to GymEnv"
            )
        return {"action_net": net}, lambda rows, keys: _discrete(rows, keys, MultiCategorical, sizes)
    if isinstance(drawn, sb3.BernoulliDistribution):
        return {"action_net": net}, lambda rows, keys: _discrete(rows, keys, Bits)
    bounds = ToBounds(policy.action_space.low, policy.action_space.high, scaled=policy.squash_output)
    if isinstance(drawn, sb3.StateDependentNoiseDistribution):
        heads: dict[str, nn.Module] = {"heads": StateDependentNoise(net, policy.log_std, drawn)}
        kind = DiagonalNormal if drawn.bijector is None else SquashedNormal
    elif isinstance(drawn, sb3.DiagGaussianDistribution):
        heads, kind = {"action_net": net, "scale": WithScale(policy.log_std)}, DiagonalNormal
    else:
        raise PreparationError(
            f"the action distribution of this policy is a {type(drawn).__name__}, which is none of Stable-Baselines3's "
            "own: put the pieces together with tdhook_rl.adapters.from_module"
        )
    return heads, lambda rows, keys: _continuous(rows, keys, kind, bounds)


def _discrete(net: nn.Module, keys: list[NestedKey], kind: Any, kwargs: dict[str, Any] | None = None) -> Any:
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=keys, out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=kind,
        distribution_kwargs=kwargs,
        return_log_prob=True,
    )


def _continuous(net: nn.Module, keys: list[NestedKey], kind: Any, bounds: ToBounds) -> TensorDictSequential:
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=keys, out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[RAW],
        distribution_class=kind,
        return_log_prob=True,
        log_prob_key="action_log_prob",
    )
    return TensorDictSequential(actor, TensorDictModule(bounds, in_keys=[RAW], out_keys=["action"]))


# ---------------------------------------------------------------------- DQN


def _q_network(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    if part != "actor":
        raise InputError(
            f"part={part!r} of a DQN: its one network gives the values of all actions, which the actor writes as "
            "'action_value', and that of its choice as 'chosen_action_value'; targets.chosen_q() explains it"
        )
    net = policy.q_net
    _require_usual(net)
    layers = {"features_extractor": net.features_extractor, "q_net": net.q_net}
    return QValueActor(
        _chain(reading.observation(), layers),
        in_keys=reading.keys,
        action_space="categorical" if reading.categorical else "one_hot",
    )


# ---------------------------------------------------------------------- SAC, TD3, DDPG


def _actor_of_actions(policy: Any, part: Piece, reading: Reading) -> TensorDictModuleBase:
    actor = _actor_head(policy.actor, reading)
    if part == "actor":
        return actor
    critic = policy.critic
    _require_usual(critic)
    names = ["state_action_value", *(f"state_action_value_{index}" for index in range(1, len(critic.q_networks)))]
    net = Critic(reading.observation(), critic.features_extractor, critic.q_networks)
    value = ValueOperator(net, in_keys=[*reading.keys, RAW], out_keys=names)
    return value if part == "value" else ActorCriticWrapper(actor, value)


def _actor_head(actor: Any, reading: Reading) -> TensorDictSequential:
    _require_usual(actor)
    bounds = ToBounds(actor.action_space.low, actor.action_space.high, scaled=True)
    layers: dict[str, nn.Module] = {"features_extractor": actor.features_extractor}
    if not hasattr(actor, "latent_pi"):  # TD3's, which draws nothing
        net = _chain(reading.observation(), {**layers, "mu": actor.mu})
        return TensorDictSequential(
            TensorDictModule(net, in_keys=reading.keys, out_keys=[RAW]),
            TensorDictModule(bounds, in_keys=[RAW], out_keys=["action"]),
        )
    layers["latent_pi"] = actor.latent_pi
    if actor.use_sde:
        layers["heads"] = StateDependentNoise(actor.mu, actor.log_std, actor.action_dist)
    else:
        layers["heads"] = TwoHeads(actor.mu, actor.log_std, _LIMITS)
    return _continuous(_chain(reading.observation(), layers), reading.keys, SquashedNormal, bounds)


class Critic(nn.Module):
    """The critics of SAC and TD3, of an observation and an action between -1 and 1."""

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
        features = self.features_extractor(self.observation(*observed))
        read = torch.cat([features, action.reshape(-1, action.shape[-1])], 1)
        found = tuple(self._modules[f"qf{index}"](read).reshape(*batch, 1) for index in range(self.count))  # type: ignore[misc]
        return found if len(found) > 1 else found[0]


# ---------------------------------------------------------------------- what is refused, and what is warned of


def _chain(first: nn.Module, layers: Mapping[str, nn.Module]) -> Rows:
    return Rows(OrderedDict({"observation": first, **layers}))


def _policy_of(model: Any) -> Any:
    try:
        from stable_baselines3.common.base_class import BaseAlgorithm
        from stable_baselines3.common.policies import BasePolicy
    except ImportError:
        raise InputError(
            "from_sb3 is for agents of Stable-Baselines3, which is not installed: pip install 'tdhook_rl[sb3]'"
        ) from None
    if isinstance(model, BaseAlgorithm):
        return model.policy
    if isinstance(model, BasePolicy):
        return model
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        raise InputError(
            f"from_sb3 takes an agent, not the path {str(model)!r}: load it with its algorithm, as in "
            f"from_sb3(PPO.load({str(model)!r})). Loading unpickles, so only load files that you trust"
        )
    raise InputError(
        f"from_sb3 takes an algorithm of Stable-Baselines3 (PPO, A2C, DQN, SAC, TD3) or its policy, not a "
        f"{type(model).__name__}: a plain module is what tdhook_rl.adapters.from_module is for"
    )


def _kind_of(policy: Any) -> str:
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy

    kinds = (ActorCriticPolicy, DQNPolicy, SACPolicy, TD3Policy)
    found = next((kind for kind in kinds if isinstance(policy, kind)), None)
    if found is None:
        raise PreparationError(
            f"from_sb3 knows the policies of PPO, A2C, DQN, SAC, TD3 and DDPG; {type(policy).__name__} is none of "
            "them: put its pieces together with tdhook_rl.adapters.from_module"
        )
    _require_usual(policy)
    return found.__name__


def _require_usual(module: Any) -> None:
    """Refuse classes that override what the numbers come from."""
    for own in type(module).__mro__:
        if not own.__module__.startswith("stable_baselines3."):
            continue
        names = [name for name in OWN_WAY.get(own.__name__, ()) if hasattr(own, name)]
        changed = [name for name in names if getattr(type(module), name) is not getattr(own, name)]
        changed += [name for name in names if name in vars(module)]
        if changed:
            raise PreparationError(_refusal(type(module), changed))


def _refusal(kind: type, changed: list[str]) -> str:
    own = f"{kind.__name__} computes in a way of its own ({', '.join(changed)})"
    if "Recurrent" in kind.__name__:
        return (
            f"{own}, with a memory that from_sb3 does not carry: build the policy from TorchRL's LSTMModule over its "
            "lstm_actor, mlp_extractor.policy_net and action_net"
        )
    if "Mask" in kind.__name__:
        return (
            f"{own}: of MaskablePPO, build the actor from its modules, with TorchRL's MaskedCategorical and the mask "
            "of the environment as an input"
        )
    return f"{own}, which from_sb3 would leave out: put its pieces together with tdhook_rl.adapters.from_module"


def _warn_of_forgotten(model: Any, normalize: Any) -> None:
    if normalize is not None:
        return
    wrapper = getattr(model, "get_vec_normalize_env", lambda: None)()
    on_policy = hasattr(model, "rollout_buffer") or hasattr(model, "gae_lambda")
    trained = wrapper is not None or (on_policy and kept_as_given(model) is not None)
    if trained and (wrapper is None or wrapper.norm_obs):
        warn(
            "this agent was trained on observations that a VecNormalize had normalised: give it, "
            "from_sb3(model, normalize=vec_normalize), where observations come as the environment gives them; "
            "normalize=False says that they come normalised"
        )
