"""Small agents of Stable-Baselines3, over observations and actions of every kind that it knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor, nn

OBSERVATIONS: dict[str, spaces.Space] = {
    "vector": spaces.Box(-3.0, 3.0, (5,), np.float32),
    "matrix": spaces.Box(-3.0, 3.0, (2, 3), np.float64),
    "index": spaces.Discrete(6),
    "indices": spaces.MultiDiscrete([3, 4]),
    "bits": spaces.MultiBinary(5),
    "pixels": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "dict": spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (36, 40, 3), np.uint8),
            "speed": spaces.Box(-1.0, 1.0, (2,), np.float32),
            "gear": spaces.Discrete(4),
        }
    ),
}
ACTIONS: dict[str, spaces.Space] = {
    "one": spaces.Discrete(3),
    "several": spaces.MultiDiscrete([3, 2]),
    "bits": spaces.MultiBinary(3),
    "torque": spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.2, 0.5]), (2,), np.float32),
    "matrix": spaces.Box(-0.3, 0.7, (2, 2), np.float32),
}
POLICIES = {"pixels": "CnnPolicy", "dict": "MultiInputPolicy"}


class Endless(gymnasium.Env):
    """Observations and rewards by chance, from spaces of any kind; an episode is seven steps."""

    def __init__(self, observation: str, action: str) -> None:
        self.observation_space = OBSERVATIONS[observation]
        self.action_space = ACTIONS[action]
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self.steps == 7, {}


def odd_extractor() -> type:
    """A feature extractor of a user's own, with what differs between training and use."""
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class OddExtractor(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space, 8)
            self.net = nn.Sequential(nn.Linear(space.shape[0], 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale

    return OddExtractor


def make_agent(name: str, observation: str = "vector", action: str = "", envs: int = 1, **kwargs: Any) -> Any:
    """An agent with small networks, by the name of its algorithm."""
    import stable_baselines3 as sb3

    kind = getattr(sb3, name)
    action = action or ("one" if name in ("PPO", "A2C", "DQN") else "torque")
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: Endless(observation, action)] * envs)
    size = (
        {"n_steps": kwargs.pop("n_steps", 8)} if name in ("PPO", "A2C") else {"buffer_size": 200, "learning_starts": 4}
    )
    size |= {"batch_size": 8} if name != "A2C" else {}
    net = {"net_arch": [16, 16], **kwargs.pop("policy_kwargs", {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return kind(
            POLICIES.get(observation, "MlpPolicy"), env, seed=0, device="cpu", policy_kwargs=net, **size, **kwargs
        )


def observations(agent: Any, rows: int = 6) -> tuple[Any, TensorDict]:
    """Observations as ``predict`` takes them, and as a policy of TorchRL does."""
    space = agent.observation_space
    space.seed(1)
    drawn = [space.sample() for _ in range(rows)]
    if isinstance(space, spaces.Dict):
        given = {name: np.stack([one[name] for one in drawn]) for name in space.spaces}
        return given, TensorDict({name: torch.as_tensor(value) for name, value in given.items()}, [rows])
    stacked = np.stack(drawn)
    return stacked, TensorDict({key_of(space): torch.as_tensor(stacked)}, [rows])


def key_of(space: spaces.Space) -> str:
    return "pixels" if len(space.shape or ()) == 3 else "observation"


def tensors(agent: Any, given: Any) -> Any:
    """Observations as the networks of the agent take them."""
    return agent.policy.obs_to_tensor(given)[0]


def own_score(agent: Any, given: Any, data: TensorDict) -> Callable[..., Tensor]:
    """The score of the stored action, by the agent's own code, of observations as its networks take them."""
    policy = agent.policy

    def score(observed: Any) -> Tensor:
        if hasattr(policy, "evaluate_actions"):
            return policy.evaluate_actions(observed, data.get("raw_action", data["action"]))[1]
        if hasattr(policy, "q_net"):
            return policy.q_net(observed).gather(1, data["action"][:, None]).squeeze(1)
        if hasattr(policy.actor, "action_dist"):
            mean, log_std, more = policy.actor.get_action_dist_params(observed)
            return policy.actor.action_dist.proba_distribution(mean, log_std, **more).log_prob(data["raw_action"])
        space = agent.action_space
        width = torch.as_tensor(space.high - space.low).flatten()
        return (policy.actor(observed) * width / 2).sum(1)  # of the action in its bounds

    return score
