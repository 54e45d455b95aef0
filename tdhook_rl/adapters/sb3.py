"""Agents of Stable-Baselines3 as TorchRL policies over the same tensors."""

from __future__ import annotations

from typing import Any

from tensordict.nn import TensorDictModuleBase

from tdhook_rl.adapters.sb3_networks import (
    LIBRARIES,
    Piece,
    actor_critic,
    actor_of_actions,
    q_network,
    require_usual,
)
from tdhook_rl.adapters.sb3_reading import Keys, Reading
from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, PreparationError, warn
from tdhook_rl.internals.sb3_names import kept_as_given
from tdhook_rl.policies.tying import tied_clone


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

    PPO, A2C, DQN, SAC, TD3 and DDPG, with vectors, pictures or dictionaries as observations; of sb3-contrib TRPO,
    MaskablePPO (which reads ``"action_mask"``) and RecurrentPPO (as a recurrent policy of TorchRL, which reads
    ``"is_init"`` and the states of its memory). The network's own modules run: copies of them that hold the same
    parameters, in evaluation mode, under the paths that they have there. Whoever trains the agent on trains this
    policy, and nothing of the agent is touched. Preparing the observation (scaled pictures, one-hot indices, channels
    first) and bringing the action into its bounds belong to the policy.

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
            gives them; ``False`` where they come normalised. Its statistics are read as they are when the policy runs;
            copies of the policy, which have weights of their own, keep those of then, and workers of collectors are
            sent them with the weights.
        in_keys: where the observation is, unless it is where ``GymEnv`` writes it: ``"observation"``, or ``"pixels"``
            of pictures in three colours; of dictionaries a key for each name.
        categorical_action_encoding: as of TorchRL's ``GymEnv``: discrete actions and observations are indices, or
            one-hot (which is ``GymEnv``'s default).

    Returns:
        a ``ProbabilisticActor`` (discrete PPO and A2C), a sequence of one and what brings actions into bounds, a
        ``QValueActor`` (DQN), or a deterministic sequence (TD3); a ``ValueOperator``; an ``ActorValueOperator`` or
        ``ActorCriticWrapper``.

    Raises:
        PreparationError: for a policy, an action distribution, or an algorithm, that computes in a way of its own.
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
        built = actor_critic(policy, part, reading)
    elif kind == "DQNPolicy":
        built = q_network(policy, part, reading)
    else:
        built = actor_of_actions(policy, part, reading)
    # Copies of the modules hold the same tensors, but not the mode: training switches it back and forth.
    return tied_clone(built).eval()


def _policy_of(model: Any) -> Any:
    try:
        from stable_baselines3.common.base_class import BaseAlgorithm
        from stable_baselines3.common.policies import BasePolicy
    except ImportError:
        raise InputError(
            "from_sb3 is for agents of Stable-Baselines3, which is not installed: pip install 'tdhook_rl[sb3]'"
        ) from None
    if isinstance(model, BaseAlgorithm):
        _require_usual_predict(model)
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


def _require_usual_predict(model: Any) -> None:
    """Refuse an algorithm that makes its actions otherwise than its policy does."""
    if "predict" in vars(model) or not type(model).predict.__module__.startswith(LIBRARIES):
        raise PreparationError(
            f"{type(model).__name__} has a predict() of its own, which from_sb3 would leave out: give its policy, "
            "from_sb3(model.policy), if actions are to be as that makes them, or put the pieces together with "
            "tdhook_rl.adapters.from_module"
        )


def _kind_of(policy: Any) -> str:
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy

    kinds = (ActorCriticPolicy, DQNPolicy, SACPolicy, TD3Policy)
    found = next((kind.__name__ for kind in kinds if isinstance(policy, kind)), None)
    if any(one.__name__ == "MaskableActorCriticPolicy" for one in type(policy).__mro__):
        found = "ActorCriticPolicy"  # the same networks
    if found is None:
        raise PreparationError(
            f"from_sb3 knows the policies of PPO, A2C, DQN, SAC, TD3 and DDPG, and of sb3-contrib's TRPO, RecurrentPPO "
            f"and MaskablePPO; {type(policy).__name__} is none of them: put its pieces together with "
            "tdhook_rl.adapters.from_module"
        )
    require_usual(policy)
    return found


def _warn_of_forgotten(model: Any, normalize: Any) -> None:
    if normalize is not None:
        return
    wrapper = getattr(model, "get_vec_normalize_env", lambda: None)()
    on_policy = hasattr(model, "rollout_buffer") or hasattr(model, "gae_lambda")
    trained = wrapper is not None or (on_policy and kept_as_given(model) is not None)
    if trained and (wrapper is None or wrapper.norm_obs):
        trained_on = (
            "on observations that a VecNormalize had normalised"
            if wrapper is not None
            else "in a VecNormalize, which normalises observations unless norm_obs=False, and is not saved with it"
        )
        warn(
            f"this agent was trained {trained_on}: give it, "
            "from_sb3(model, normalize=vec_normalize), where observations come as the environment gives them; "
            "normalize=False says that they come normalised"
        )
