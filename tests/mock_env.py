"""A small environment of any keys and specs, for policies of any kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

__all__ = ["MockEnv"]


class MockEnv(EnvBase):
    """Observations drawn from a generator of the environment's own; episodes of a few steps.

    Args:
        observations: specs of one row. Boolean entries are masks of which the first element is true.
        actions: specs of one row; the environment does not react to actions.
        batch_size: how many copies are stepped at once.
        length: steps of an episode; of the odd copies one more, so that copies end at different times.
        seed: of the observations.
    """

    def __init__(
        self,
        observations: Mapping[NestedKey, TensorSpec],
        actions: Mapping[NestedKey, TensorSpec],
        *,
        batch_size: tuple[int, ...] = (),
        length: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        self._rows = dict(observations)
        self._length = length
        self._draws = torch.Generator().manual_seed(seed)
        self.observation_spec = self._spec({**observations, "elapsed": Unbounded(shape=(), dtype=torch.long)})
        self.state_spec = self._spec({"elapsed": Unbounded(shape=(), dtype=torch.long)})
        self.action_spec = self._spec(actions)
        self.reward_spec = Unbounded(shape=(*self.batch_size, 1))
        self.done_spec = self._spec(
            {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        )

    def _spec(self, rows: Mapping[NestedKey, TensorSpec]) -> Composite:
        spec = Composite(shape=self.batch_size)
        for key, row in rows.items():
            spec[key] = row.expand(*self.batch_size, *row.shape)
        return spec

    def _observe(self, elapsed: Tensor) -> TensorDict:
        data = TensorDict({"elapsed": elapsed}, batch_size=self.batch_size)
        for key, row in self._rows.items():
            shape = (*self.batch_size, *row.shape)
            if row.dtype.is_floating_point:
                value = torch.randn(shape, generator=self._draws)
            else:
                high = 2 if row.dtype == torch.bool else 256
                value = torch.randint(high, shape, generator=self._draws).to(row.dtype)
            if row.dtype == torch.bool:
                value[..., 0] = True
            data.set(key, value)
        return data

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        return self._observe(torch.zeros(self.batch_size, dtype=torch.long))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        elapsed = tensordict["elapsed"] + 1
        data = self._observe(elapsed)
        copies = torch.arange(self.batch_size.numel()).reshape(self.batch_size)
        done = (elapsed >= self._length + copies % 2).unsqueeze(-1)
        data.update({"done": done, "terminated": done, "truncated": torch.zeros_like(done)})
        return data.set("reward", torch.ones(*self.batch_size, 1))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._draws.manual_seed(seed)
