"""How the networks of a Stable-Baselines3 policy read observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from tensordict import NestedKey

from tdhook_rl.adapters.normalisation import normalisers
from tdhook_rl.adapters.observations import Observation, Part
from tdhook_rl.errors import InputError

Keys: TypeAlias = NestedKey | Mapping[str, NestedKey]


def observation_keys(policy: Any, in_keys: Keys | None) -> list[NestedKey]:
    """Where the entries of a policy's observation are, in the order of its space."""
    return Reading(policy, None, in_keys, True).keys


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

    def _own_key(self) -> str:
        """What TorchRL's ``GymEnv`` calls it: what has the bounds of bytes and three colours has a name of its own."""
        from gymnasium import spaces

        space = self.policy.observation_space
        colours = isinstance(space, spaces.Box) and len(space.shape) == 3 and 3 in (space.shape[0], space.shape[-1])
        return "pixels" if colours and (space.low == 0).all() and (space.high == 255).all() else "observation"

    def _keys(self, in_keys: Keys | None) -> list[NestedKey]:
        if "" in self.parts:
            if isinstance(in_keys, Mapping):
                raise InputError(f"this policy reads one observation: in_keys= is its key, not {dict(in_keys)}")
            return [self._own_key() if in_keys is None else in_keys]
        given = {name: name for name in self.parts} if in_keys is None else in_keys
        if not isinstance(given, Mapping) or set(given) != set(self.parts):
            raise InputError(
                f"this policy reads {', '.join(map(repr, self.parts))}: in_keys= has a key for each, by name; found "
                f"{given!r}"
            )
        return [given[name] for name in self.parts]
