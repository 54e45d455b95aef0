"""What is used of the insides of Stable-Baselines3, by name: it is not imported here."""

from __future__ import annotations

from typing import Any

__all__ = ["OWN_WAY", "ended_last", "kept_as_given"]

#: From an observation to an action of the environment.
_BY_ITSELF = ("_predict", "predict", "obs_to_tensor", "unscale_action")
#: From the output of a network to an action and its score.
_DRAWN = ("proba_distribution", "get_actions", "sample", "mode", "log_prob")

#: By class of Stable-Baselines3, the methods that its numbers come from: ``predict`` calls these, so a user's class
#: that overrides one computes something else, and nothing public says so.
OWN_WAY: dict[str, tuple[str, ...]] = {
    "RecurrentActorCriticPolicy": (
        "get_distribution", "_get_action_dist_from_latent", "extract_features", *_BY_ITSELF,
    ),
    "MaskableActorCriticPolicy": (
        "get_distribution", "predict_values", "_get_action_dist_from_latent", "extract_features", *_BY_ITSELF,
    ),
    "ActorCriticPolicy": (
        "get_distribution", "predict_values", "_get_action_dist_from_latent", "extract_features", *_BY_ITSELF,
    ),
    "DQNPolicy": _BY_ITSELF,
    "QNetwork": ("forward", "_predict", "extract_features"),
    "SACPolicy": _BY_ITSELF,
    "TD3Policy": _BY_ITSELF,
    "Actor": ("forward", "_predict", "extract_features", "get_action_dist_params"),
    "ContinuousCritic": ("forward", "extract_features"),
    "CategoricalDistribution": _DRAWN,
    "MultiCategoricalDistribution": _DRAWN,
    "BernoulliDistribution": _DRAWN,
    "DiagGaussianDistribution": _DRAWN,
    "SquashedDiagGaussianDistribution": _DRAWN,
    "StateDependentNoiseDistribution": ("get_std", *_DRAWN),
    "MaskableCategoricalDistribution": ("apply_masking", *_DRAWN),
}  # fmt: skip


def kept_as_given(model: Any) -> Any:
    """The last observation before ``VecNormalize`` changed it, which an algorithm keeps, and saves, if it trained in
    one (of PPO and A2C; off-policy ones keep it always): a loaded agent says by nothing else that it did."""
    return getattr(model, "_last_original_obs", None)


def ended_last(model: Any) -> Any:
    """For each environment, whether its episode ended with the last step of the rollout: the buffer has the beginnings
    only, and the next one is not in it yet."""
    return model._last_episode_starts
