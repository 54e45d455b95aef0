"""The environments for Gymnasium: one copy, numpy observations, concepts in the info.

Ids such as ``tdhook_rl/CueCorners-v0`` exist after ``import tdhook_rl.envs``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.errors import InputError


class GymnasiumFace(gymnasium.Env):
    """One copy of a :class:`~tdhook_rl.envs.ConceptEnv` with Gymnasium's interface.

    ``info["concept"]`` holds the labels by name. ``reset(options={"state": {...}})`` begins in a given state;
    its entries are those of :meth:`ConceptEnv.state`, without a batch dimension.

    Args:
        env: the class of the environment.
        render_mode: ``None`` or ``"rgb_array"``.
        options: of the environment's constructor.

    Example:
        >>> env = gymnasium.make("tdhook_rl/CueCorners-v0", max_steps=10)
        >>> observation, info = env.reset(seed=0, options={"state": {"cell": 7, "bits": [1, 0, 0, 1]}})
        >>> int(info["concept"]["paying_corner"]), observation.dtype
        (0, dtype('float32'))
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(self, env: type[ConceptEnv], render_mode: str | None = None, **options: Any) -> None:
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        if "batch_size" in options:
            raise InputError(f"a Gymnasium environment is one copy; use {env.__name__}(batch_size=...) for a batch")
        self.env = env(**options)
        self.render_mode = render_mode
        spec = self.env.observation_spec["observation"]
        dtype = np.uint8 if spec.dtype == torch.uint8 else np.float32
        low, high = spec.space.low.numpy(force=True), spec.space.high.numpy(force=True)
        self.observation_space = spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        self.action_space = spaces.Discrete(self.env.n_actions)
        self._state: TensorDictBase | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; every episode has a seed of its own, drawn from ``np_random``."""
        super().reset(seed=seed)
        self.env.set_seed(int(self.np_random.integers(2**31)))
        unknown = set(options or {}) - {"state"}
        if unknown:
            raise InputError(f"reset knows the option 'state', got {', '.join(sorted(unknown))}")
        given = (options or {}).get("state")
        self._state = self.env.reset() if given is None else self.env.state(**given)
        if self._state.batch_size:
            raise InputError(f"the state of one copy has no batch dimension, got {tuple(self._state.batch_size)}")
        return self._observed()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; see :meth:`gymnasium.Env.step`."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        if not self.action_space.contains(action):
            raise InputError(f"an action is an integer from 0 to {self.env.n_actions - 1}, got {action!r}")
        following = self.env._step(self._state.set("action", torch.as_tensor(int(action))))
        self._state = following.exclude("reward")
        ends = (bool(following[key]) for key in ("terminated", "truncated"))
        observation, info = self._observed()
        terminated, truncated = ends
        return observation, float(following["reward"]), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """The frame, uint8 ``(height, width, 3)``."""
        if self.render_mode is None:
            gymnasium.logger.warn("render was called without a render_mode; make the environment with 'rgb_array'")
            return None
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset before render")
        return self.env.render(self._state).numpy(force=True)

    def _observed(self) -> tuple[np.ndarray, dict[str, Any]]:
        assert self._state is not None
        labels = {name: value.numpy(force=True).copy()[()] for name, value in self._state["concept"].items()}
        return self._state["observation"].numpy(force=True).copy(), {"concept": labels}


def register(*environments: type[ConceptEnv]) -> None:
    """Make environments known to ``gymnasium.make`` under their :attr:`ConceptEnv.gymnasium_id`."""
    for env in environments:
        if env.gymnasium_id not in gymnasium.registry:
            gymnasium.register(env.gymnasium_id, entry_point=GymnasiumFace, kwargs={"env": env})
