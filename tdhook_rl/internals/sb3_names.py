"""What is used of the insides of Stable-Baselines3, by name: it is not imported here."""

from __future__ import annotations

from typing import Any

__all__ = ["OWN_WAY", "ended_last", "kept_as_given"]

#: By class of Stable-Baselines3, the methods that its numbers come from: ``predict`` calls these, so a user's class
#: that overrides one computes something else, and nothing public says so.
OWN_WAY: dict[str, tuple[str, ...]] = {
    "RecurrentActorCriticPolicy": (
        "get_distribution", "_get_action_dist_from_latent", "extract_features", "_predict", "predict",
    ),
    "MaskableActorCriticPolicy": (
        "get_distribution", "predict_values", "_get_action_dist_from_latent", "extract_features", "_predict", "predict",
    ),
    "ActorCriticPolicy": (
        "get_distribution", "predict_values", "_get_action_dist_from_latent", "extract_features", "_predict", "predict",
    ),
    "DQNPolicy": ("_predict", "predict"),
    "QNetwork": ("forward", "_predict", "extract_features"),
    "SACPolicy": ("_predict", "predict"),
    "TD3Policy": ("_predict", "predict"),
    "Actor": ("forward", "_predict", "extract_features", "get_action_dist_params"),
    "ContinuousCritic": ("forward", "extract_features"),
}  # fmt: skip


def kept_as_given(model: Any) -> Any:
    """The last observation before ``VecNormalize`` changed it, which an algorithm keeps, and saves, if it trained in
    one (of PPO and A2C; off-policy ones keep it always): a loaded agent says by nothing else that it did."""
    return getattr(model, "_last_original_obs", None)


def ended_last(model: Any) -> Any:
    """For each environment, whether its episode ended with the last step of the rollout: the buffer has the beginnings
    only, and the next one is not in it yet."""
    return model._last_episode_starts
