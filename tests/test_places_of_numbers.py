"""Numbers that a policy in float64 is given have its places, in every intervention and in sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase

from tdhook_rl import SteeringVectors
from tdhook_rl.latent import DirectionClamping, StateSubtraction, UnitValues
from tdhook_rl.method import Method
from tdhook_rl.sweeps import steering_sweep

SITE = "module.1"
PUSHED = torch.tensor([0.3, -1.1, 0.7, 2.3], dtype=torch.float64)
UNIT = PUSHED / PUSHED.norm()


def shifted(rows: TensorDict) -> TensorDict:
    return rows.set("observation", rows["observation"] + 1)


#: Methods with a number, and what they make of an activation and of that of the counterfactual input.
WITH_NUMBERS: dict[str, tuple[Callable[[float], Method], Callable[..., torch.Tensor]]] = {
    "SteeringVectors": (lambda x: SteeringVectors({SITE: PUSHED}, alpha=x), lambda h, other, x: h + x * PUSHED),
    "DirectionClamping": (
        lambda x: DirectionClamping({SITE: PUSHED}, value=x), lambda h, other, x: h + (x - h @ UNIT)[:, None] * UNIT
    ),
    "UnitValues": (
        lambda x: UnitValues({SITE: [1]}, value=x), lambda h, other, x: torch.where(torch.arange(4) == 1, x, h)
    ),
    "StateSubtraction": (
        lambda x: StateSubtraction([SITE], shifted, alpha=x), lambda h, other, x: h + x * (other - h)
    ),
}  # fmt: skip


@pytest.mark.parametrize("number", [0.1, 0.7, -1 / 3, 1e-9])
@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_numbers_keep_the_places_that_the_policy_has(name: str, number: float) -> None:
    make, by_hand = WITH_NUMBERS[name]
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    policy = TensorDictModule(net, ["observation"], ["action"])
    data = TensorDict({"observation": torch.randn(5, 3, dtype=torch.float64)}, [5])
    inside, other = (net[1](net[0](one)) for one in (data["observation"], data["observation"] + 1))
    with make(number).prepare(policy) as hooked:
        found = hooked(data.clone())["action"]
    torch.testing.assert_close(found, net[2](by_hand(inside, other, number)), rtol=0, atol=1e-14)


def test_strengths_of_a_sweep_have_the_places_of_the_policy() -> None:
    class Fixed(EnvBase):
        """Always the same state, and the sum of the action as reward."""

        def __init__(self) -> None:
            super().__init__()
            self._batch_locked = False
            self.observation_spec = Composite(observation=Unbounded(3, dtype=torch.float64))
            self.action_spec = Unbounded(2, dtype=torch.float64)
            self.reward_spec = Unbounded(1, dtype=torch.float64)

        def _set_seed(self, seed: int | None) -> None: ...

        def _reset(self, tensordict: Any = None, **_: Any) -> TensorDict:
            batch = self.batch_size if tensordict is None else tensordict.batch_size
            return TensorDict({"observation": torch.ones(*batch, 3, dtype=torch.float64)}, batch)

        def _step(self, tensordict: Any) -> TensorDict:
            reward, batch = tensordict["action"].sum(-1, keepdim=True), tensordict.batch_size
            found = {"observation": tensordict["observation"], "reward": reward, "done": torch.ones_like(reward).bool()}
            return TensorDict(found, batch)

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    policy = TensorDictModule(net, ["observation"], ["action"])
    found = steering_sweep(policy, Fixed(), {"push": {SITE: PUSHED}}, alphas=[0.7], controls=1, episodes=2, max_steps=1)
    hand = net[2](net[:2](torch.ones(3, dtype=torch.float64)) + 0.7 * PUSHED).sum().detach()
    torch.testing.assert_close(found.of("return", alpha=0.7), hand.expand(2), rtol=0, atol=1e-14)
