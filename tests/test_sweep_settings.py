"""A sweep goes on in its folder in the same environment, with the same policy, and with no other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import (
    CatFrames,
    Compose,
    EnvBase,
    GymEnv,
    GymWrapper,
    RenameTransform,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.modules import ProbabilisticActor, TanhNormal

from tdhook_rl.errors import InputError
from tdhook_rl.files.functions import untold_in
from tdhook_rl.internals.torchrl_names import wrapped_env
from tdhook_rl.replaying.environment_settings import settings_of
from tdhook_rl.replaying.policy_settings import policy_settings
from tdhook_rl.sweeps import steering_sweep
from tests.zoo import ZOO


@dataclass
class Wind:
    """What blows."""

    force: float
    name: str = "north"


class Point(EnvBase):
    """A point that is blown away, made with whatever somebody keeps of his arguments."""

    def __init__(self, wind: Any = 0.1, *, limit: float = 1.0, reward: Callable[..., Any] | None = None) -> None:
        super().__init__(batch_size=())
        self.wind, self._limit, self.reward = wind, limit, reward
        self.observation_spec = Composite(observation=Unbounded((2,)), time=Unbounded((1,)))
        self.action_spec = Unbounded((2,))
        self.reward_spec = Unbounded((1,))
        self.done_spec = Categorical(2, shape=(1,), dtype=torch.bool)
        self.steps = 0
        self.numbers = torch.Generator()

    def _set_seed(self, seed: int | None) -> None:
        self.numbers.manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        start = torch.randn(2, generator=self.numbers)
        return TensorDict({"observation": start, "time": torch.zeros(1)})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.steps += 1  # what moves on is no setting
        at, time = tensordict["observation"] + 0.1 * tensordict["action"], tensordict["time"] + 1
        return TensorDict({"observation": at, "time": time, "reward": at[:1], "done": time >= 3})


def twice(factor: float) -> Callable[[float], float]:
    return lambda reward: reward * factor


def swing(**options: Any) -> EnvBase:
    return GymEnv("Pendulum-v1", **options)


def behind_many(limit: int) -> EnvBase:
    """The last of transforms that are longer in words than anybody reads."""
    many = [RenameTransform([], []), RewardSum(), CatFrames(2, -1, in_keys=["observation"], out_keys=["frames"])]
    return TransformedEnv(Point(), Compose(*many, StepCounter(limit)))


#: How an environment is made, and the same otherwise.
MADE: dict[str, tuple[Callable[[], EnvBase], Callable[[], EnvBase]]] = {
    "a number": (lambda: Point(0.1), lambda: Point(0.2)),
    "a number of its own": (lambda: Point(limit=1.0), lambda: Point(limit=2.0)),
    "an object": (lambda: Point(Wind(0.1)), lambda: Point(Wind(0.2))),
    "a space of names": (lambda: Point(SimpleNamespace(f=1)), lambda: Point(SimpleNamespace(f=2))),
    "a mapping": (lambda: Point({"f": [1, 2]}), lambda: Point({"f": [1, 3]})),
    "a tensor": (lambda: Point(torch.ones(2)), lambda: Point(torch.zeros(2))),
    "a function": (lambda: Point(reward=twice(1)), lambda: Point(reward=twice(2))),
    "a partial": (lambda: Point(reward=functools.partial(max, 1)), lambda: Point(reward=functools.partial(max, 2))),
    "a transform": (
        lambda: TransformedEnv(Point(), StepCounter(5)), lambda: TransformedEnv(Point(), StepCounter(6)),
    ),
    "one of many transforms": (lambda: behind_many(2), lambda: behind_many(3)),
    "arguments of Gymnasium": (lambda: swing(g=9.0), lambda: swing(g=2.0)),
    "frames": (lambda: swing(frame_skip=2), lambda: swing(frame_skip=3)),
    "a wrapper of Gymnasium": (
        lambda: GymWrapper(gymnasium.wrappers.TransformReward(gymnasium.make("Pendulum-v1"), twice(1))),
        lambda: GymWrapper(gymnasium.wrappers.TransformReward(gymnasium.make("Pendulum-v1"), twice(2))),
    ),
    "a limit of Gymnasium": (lambda: swing(max_episode_steps=4), lambda: swing(max_episode_steps=5)),
    "functions that make some": (
        lambda: SerialEnv(2, functools.partial(Point, 0.1)), lambda: SerialEnv(2, functools.partial(Point, 0.2)),
    ),
}  # fmt: skip


def acting(env: EnvBase) -> nn.Module:
    torch.manual_seed(0)
    width = env.observation_spec["observation"].shape[-1]
    return TensorDictSequential(
        TensorDictModule(nn.Linear(width, env.action_spec.shape[-1]), ["observation"], ["action"])
    )


def swept(env: EnvBase, folder: Path, policy: nn.Module | None = None, path: str = "module.0.module") -> Any:
    policy = acting(env) if policy is None else policy
    vector = {"v": {path: torch.ones(policy.get_submodule(path).out_features)}}
    options: dict[str, Any] = {"alphas": [1.0], "controls": 1, "episodes": 2, "max_steps": 4, "progress": False}
    return steering_sweep(policy, env, vector, folder=folder, **options)


@pytest.mark.filterwarnings("ignore:.*did not end", "ignore:.*goes on as the same")
@pytest.mark.parametrize("name", MADE)
def test_a_sweep_goes_on_where_all_was_made_alike(name: str, tmp_path: Path) -> None:
    make, other = MADE[name]
    env = make()
    first = swept(env, tmp_path)
    assert swept(env, tmp_path).records() == first.records()  # the very one, which has been played in
    assert swept(make(), tmp_path).records() == first.records()
    with pytest.raises(InputError, match=r"another environment, which was made with other arguments \(\{'"):
        swept(other(), tmp_path)


@pytest.mark.parametrize("name", MADE)
def test_settings_do_not_move(name: str) -> None:
    env = MADE[name][0]()
    before = settings_of(env)
    env.rollout(3)
    env.set_seed(5)
    assert settings_of(env) == before == settings_of(MADE[name][0]())


def test_what_is_wrapped_is_no_attribute_of_what_wraps_nothing() -> None:
    assert wrapped_env(Point()) is None
    assert wrapped_env(swing()) is not None


class Divides(nn.Module):
    """Has a temperature that somebody sets, and counts its calls."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature, self._offset, self.act = temperature, 0.0, torch.tanh
        self.scale, self.options, self.table = torch.ones(4), SimpleNamespace(gain=1.0), {"shift": [0.0]}
        self.calls, self.seen, self.mean = 0, list[float](), torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x.sum().item())
        self.mean.mul_(0.9)
        shift = self._offset + self.table["shift"][0]
        return self.act(self.options.gain * self.scale * x / self.temperature + shift)

    def set_temperature(self, value: float) -> None:
        self.temperature = value


class Multiplies(Divides):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x * self.temperature + self._offset)


def net(*layers: nn.Module, **bounds: Any) -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(2, 4), *layers, nn.Linear(4, 4), NormalParamExtractor())
    module = TensorDictModule(parts, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs={"low": -1.0, **bounds}
    )


def with_set(name: str, value: Any) -> nn.Module:
    module = Divides()
    setattr(module, name, value)
    return net(module)


def told() -> nn.Module:
    module = Divides()
    module.set_temperature(2.0)
    return net(module)


def hooked(factor: float) -> nn.Module:
    policy = net(nn.Tanh())
    policy.module[0].module[0].register_forward_hook(lambda module, args, output: factor * output)
    return policy


#: Policies of the same weights, and others than the first of them.
POLICIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "an activation": (lambda: net(nn.Tanh()), lambda: net(nn.ReLU())),
    "its option": (lambda: net(nn.LeakyReLU(0.1)), lambda: net(nn.LeakyReLU(0.2))),
    "one more": (lambda: net(nn.Tanh()), lambda: net(nn.Tanh(), nn.Tanh())),
    "a norm": (lambda: net(nn.LayerNorm(4)), lambda: net(nn.LayerNorm(4, eps=0.5))),
    "a bound": (lambda: net(nn.Tanh()), lambda: net(nn.Tanh(), low=-2.0)),
    "bounds as tensors": (lambda: net(high=torch.ones(2)), lambda: net(high=2 * torch.ones(2))),
    "a temperature": (lambda: net(Divides(1.0)), lambda: net(Divides(2.0))),
    "one that was set": (lambda: net(Divides()), lambda: with_set("temperature", 2.0)),
    "one that was told": (lambda: net(Divides()), told),
    "a tensor": (lambda: net(Divides()), lambda: with_set("scale", 2 * torch.ones(4))),
    "options": (lambda: net(Divides()), lambda: with_set("options", SimpleNamespace(gain=2.0))),
    "a table": (lambda: net(Divides()), lambda: with_set("table", {"shift": [0.5]})),
    "dropout": (lambda: net(nn.Dropout(0.5)).eval(), lambda: net(nn.Dropout(0.5)).train()),
    "a hook": (lambda: net(nn.Tanh()), lambda: hooked(2.0)),
    "its factor": (lambda: hooked(2.0), lambda: hooked(3.0)),
    "a private number": (lambda: net(Divides()), lambda: with_set("_offset", 0.5)),
    "a function": (lambda: net(Divides()), lambda: with_set("act", torch.sin)),
    "a class of one's own": (lambda: net(Divides()), lambda: net(Multiplies())),
}


@pytest.mark.filterwarnings("ignore:.*did not end", "ignore:.*goes on as the same")
@pytest.mark.parametrize("name", POLICIES)
def test_a_sweep_goes_on_with_the_same_policy(name: str, tmp_path: Path) -> None:
    make, other = POLICIES[name]
    policy, env, path = make(), Point(), "module.0.module.0"
    first = swept(env, tmp_path, policy, path)
    env.rollout(3, policy)  # acting changes a counter, and no setting
    assert swept(env, tmp_path, policy, path).records() == first.records()
    assert swept(env, tmp_path, make(), path).records() == first.records()
    with pytest.raises(InputError, match=r"another policy, of modules of other kinds or with other options \(\{'"):
        swept(env, tmp_path, other(), path)


@pytest.mark.parametrize("name", ZOO)
def test_settings_of_policies_do_not_move(name: str) -> None:
    policy = ZOO[name].build()
    before = policy_settings(policy)
    assert before == policy_settings(ZOO[name].build()) == policy_settings(copy.deepcopy(policy))
    assert not untold_in(before)
