"""Vectors of Gymnasium environments: each play begins with the first states of all rows, whatever came before.

A plain reset, after a step that ended some rows, gives the observations of that step, as ``tests/contracts_torchrl.py``
shows of the TorchRL that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase, GymEnv, GymWrapper, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_rl import SteeringVectors
from tdhook_rl.replaying.environment_state import same_state
from tdhook_rl.rollout import alike_episodes
from tdhook_rl.sweeps import SteeringVector, ablate_units, steering_sweep

NEAR = 0.05  # the first states of CartPole are so near 0


def vector() -> EnvBase:
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    made = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode=mode)
    return GymWrapper(made)


ENVS: dict[str, Callable[[], EnvBase]] = {
    "a vector": vector,
    "under transforms": lambda: TransformedEnv(vector(), StepCounter()),
    "one": lambda: GymEnv("CartPole-v1"),
}


def used(name: str) -> EnvBase:
    """An environment in which the last step has ended the episode of a row."""
    env = ENVS[name]()
    torch.manual_seed(0)
    env.set_seed(0)
    played = env.rollout(60, break_when_any_done=True)
    assert bool(played["next", "done"][..., -1, :].any())
    return env


def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]), in_keys=["logits"], distribution_class=OneHotCategorical
    )


def first(episodes: TensorDictBase) -> Tensor:
    """How far the first state of each episode is from 0."""
    return episodes["observation"][:, 0].abs().amax(-1).double()


@pytest.mark.parametrize("name", ENVS)
def test_all_rows_begin_anew(name: str) -> None:
    """While something is played again and again, and for the user afterwards."""
    env = used(name)
    with same_state(env) as put_back:
        for _ in range(2):
            put_back()
            env.set_seed(0)
            played = env.rollout(60, break_when_any_done=True)
            assert float(played["observation"][..., 0, :].abs().max()) <= NEAR
    assert float(env.reset()["observation"].abs().max()) <= NEAR


def single(seeds: list[int], alpha: float) -> list[float]:
    """Lengths of greedy episodes, each in an environment of its own."""
    steered = SteeringVectors(SteeringVector(vector=torch.ones(8), path="module.0.module.1"), alpha=alpha)
    found = []
    with steered.prepare(actor()) as policy, set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        for seed in seeds:
            env = GymEnv("CartPole-v1")
            env.set_seed(seed)
            found.append(float(len(env.rollout(60, policy))))
    return found


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("name", ENVS)
def test_conditions_of_a_sweep(name: str) -> None:
    options: dict[str, Any] = {"controls": 1, "episodes": 4, "max_steps": 60, "progress": False}
    steering = SteeringVector(vector=torch.ones(8), path="module.0.module.1")
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found = steering_sweep(
            actor(), used(name), steering, alphas=[1.0, 3.0], outcomes={"first": first, "length": "length"}, **options
        )
    assert found.paired
    for alpha in (0.0, 1.0, 3.0):
        assert float(found.of("first", alpha=alpha).max()) <= NEAR
        assert torch.equal(found.of("first", alpha=alpha), found.of("first", alpha=0.0))
        if name == "one":
            seeds = [found.facts["seed"] * 1_000_003 + block for block in range(4)]
            assert found.of("length", alpha=alpha).tolist() == single(seeds, alpha)


@pytest.mark.parametrize("name", ENVS)
def test_episodes_that_are_alike_and_ablations(name: str) -> None:
    env, policy = used(name), actor()
    with SteeringVectors({"module.0.module.1": torch.ones(8)}).prepare(policy) as hooked:
        episodes = alike_episodes(hooked, env, episodes=4, max_steps=30)
    assert all(float(one["observation"][0].abs().max()) <= NEAR for one in episodes)
    data = GymEnv("CartPole-v1").rollout(8, policy)
    table = ablate_units(policy, data, sites="module.0.module.1", most=1, env=env, episodes=4, max_steps=30)
    fresh = ablate_units(policy, data, sites="module.0.module.1", most=1, env=ENVS[name](), episodes=4, max_steps=30)
    assert table.records() == fresh.records()
