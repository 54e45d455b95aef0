"""Dose and response: what steering does at each strength, against random vectors of equal norm.

Every condition starts from the same states and draws its actions from the same noise (common random
numbers), in one batched rollout, so that conditions differ by the steering alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import EnvBase

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent import SteeringVector, SteeringVectors
from tdhook_rl.statistics import Interval, grouped_mean

Outcomes = Callable[[TensorDictBase, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class DoseResponse:
    """Rates of outcomes by vector and alpha.

    Args:
        alphas: the strengths.
        rates: for each outcome ``(1 + controls, alphas)``; row 0 is the vector, the others are random.
        episodes: how many episodes each rate is a mean of.
    """

    alphas: tuple[float, ...]
    rates: Mapping[str, Tensor]
    episodes: int

    def of_vector(self, outcome: str) -> Tensor:
        """The rate at each alpha under the vector."""
        return self.rates[outcome][0]

    def intervals(self, outcome: str) -> list[Interval]:
        """The rate at each alpha under the vector, with its interval over episodes.

        Example:
            >>> response = DoseResponse((0.0, 1.0), {"won": torch.tensor([[0.0, 0.75], [0.0, 0.25]])}, episodes=8)
            >>> [(round(one.low, 2), one.estimate, round(one.high, 2), one.groups) for one in response.intervals("won")]
            [(0.0, 0.0, 0.37, 8), (0.24, 0.75, 0.99, 8)]
        """
        counts = [round(rate * self.episodes) for rate in self.of_vector(outcome).tolist()]
        return [
            grouped_mean([1.0] * count + [0.0] * (self.episodes - count), bounds=(0.0, 1.0), method="t")
            for count in counts
        ]

    def best_control(self, outcome: str) -> Tensor:
        """The largest rate at each alpha among the random vectors."""
        return self.rates[outcome][1:].amax(0)


@checked
def dose_response(
    policy: nn.Module,
    env: EnvBase,
    vector: SteeringVector,
    *,
    outcomes: Outcomes,
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    sign: Callable[[TensorDictBase], Tensor] | None = None,
    controls: int = 8,
    episodes: int = 512,
    max_steps: int = 100,
    seed: int = 0,
) -> DoseResponse:
    """Roll a policy with discrete actions out under every vector and alpha at once.

    Args:
        policy: the policy, not hooked; it outputs ``"logits"``.
        env: an environment with an empty batch size that is not batch-locked and keeps its state in the
            TensorDict, such as :class:`tdhook_rl.envs.CueCorners`.
        vector: the direction under test.
        outcomes: maps a rollout and the mask of its first episodes, ``(conditions, episodes, time)``, to
            booleans ``(conditions, episodes)`` by name.
        alphas: the strengths, in units of the vector.
        sign: for each start state +1 or -1, where the wanted direction depends on the state.
        controls: how many random vectors of equal norm are compared.
        episodes: episodes of each condition.
        max_steps: the longest an episode may last.
        seed: of the start states, the noise and the random vectors.

    Raises:
        InputError: if the environment is batch-locked, or there is nothing to compare.
    """
    if env.batch_locked or env.batch_size.numel() != 1 or env.batch_size:
        raise InputError("dose_response needs an environment that is not batch-locked and has an empty batch size")
    if not alphas or controls < 1 or episodes < 1:
        raise InputError(f"nothing to compare: {len(alphas)} alphas, {controls} controls, {episodes} episodes")
    generator = torch.Generator().manual_seed(seed)
    env.set_seed(seed)
    start = env.reset(TensorDict({}, batch_size=[episodes]).set("_reset", torch.ones(episodes, 1, dtype=torch.bool)))
    start = start.exclude("_reset")
    directions = torch.cat([vector.vector[None], vector.random_like(controls, generator)])
    conditions = len(directions) * len(alphas)
    shape = (conditions, episodes)
    pointing = torch.ones(episodes) if sign is None else sign(start).to(vector.vector.dtype)
    features = vector.vector.ndim
    rows = directions.repeat_interleave(len(alphas), 0)[:, None] * pointing.reshape(1, -1, *(1,) * features)
    data = start.expand(shape).clone()
    data["steering_vector"] = rows
    data["steering_alpha"] = torch.tensor(alphas).repeat(len(directions))[:, None].expand(shape).contiguous()
    method = SteeringVectors({vector.path: "steering_vector"}, alpha="steering_alpha")
    with torch.no_grad(), method.prepare(policy) as hooked:
        acting = TensorDictSequential(hooked, SharedNoise(generator))
        rollout = env.rollout(max_steps, acting, auto_reset=False, tensordict=data, break_when_any_done=False)
    found = outcomes(rollout, first_episode(rollout))
    rates = {name: happened.double().mean(1).reshape(len(directions), len(alphas)) for name, happened in found.items()}
    return DoseResponse(tuple(alphas), rates, episodes)


@checked
def first_episode(rollout: TensorDictBase, done_key: NestedKey = ("next", "done")) -> Tensor:
    """Which steps belong to the first episode of each row: ``batch``, time last."""
    done = rollout[done_key].squeeze(-1).long()
    return done.cumsum(-1) - done == 0


class SharedNoise(TensorDictModuleBase):
    """Sample actions from logits by the Gumbel-max trick, with one noise for all conditions."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.in_keys = ["logits"]
        self.out_keys = ["action"]
        self._generator = generator

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits = tensordict["logits"]
        uniform = torch.rand(logits.shape[1:], generator=self._generator, dtype=torch.float64)
        noise = -(-uniform.clamp_min(1e-300).log()).log()
        return tensordict.set("action", (logits + noise).argmax(-1))
