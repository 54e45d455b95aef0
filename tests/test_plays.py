"""Several plays of one environment: no episode is played twice, and no action is taken for another."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical as Draw
from torchrl.data import Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, Unbounded
from torchrl.envs import EnvBase, GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_rl import ActivationCaching
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.rollout import alike_episodes
from tdhook_rl.sweeps import ablate_units, steering_sweep
from tdhook_rl.sweeps.causal.returns import returns_of

SITE = "module.0.module"


class Row(EnvBase):
    """Walks of two steps whose starts say which seed they are of: rows of a batch are seeded one after the other."""

    def __init__(self, batch: tuple[int, ...] = (), action: Any = None) -> None:
        super().__init__(batch_size=batch)
        shape = torch.Size(batch)
        self.observation_spec = Composite(observation=Unbounded((*shape, 2)), time=Unbounded((*shape, 1)), shape=shape)
        self.action_spec = Unbounded((*shape, 2)) if action is None else action.expand(*shape, *action.shape)
        self.reward_spec = Unbounded((*shape, 1))
        self.done_spec = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        self._first = 0

    def _set_seed(self, seed: int | None) -> None:
        self._first = seed or 0

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        seeds = self._first + torch.arange(self.batch_size.numel()).reshape(self.batch_size)
        at = torch.stack([seeds % (1 << 22), 0 * seeds], -1).float()  # which float32 tells apart
        return TensorDict({"observation": at, "time": torch.zeros_like(at[..., :1])}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        at, time = tensordict["observation"], tensordict["time"] + 1
        found = {"observation": at, "time": time, "reward": at[..., :1], "done": time > 1}
        return TensorDict(found, batch_size=tensordict.batch_size)


def policy(draws: int = 0, keys: tuple[str, str] = ("observation", "action"), width: int = 2) -> nn.Module:
    net = TensorDictModule(nn.Linear(width, draws or 2), [keys[0]], ["logits" if draws else keys[1]])
    return TensorDictSequential(net)


def starts(data: TensorDictBase) -> Tensor:
    return data["observation"][:, 0, 0]


ENVS: dict[str, Callable[[], EnvBase]] = {
    "one": Row,
    "a row of three": lambda: Row((3,)),
    "two rows of two": lambda: Row((2, 2)),
    "transformed": lambda: TransformedEnv(Row((3,)), StepCounter()),
    "serial": lambda: SerialEnv(3, Row),
    "serial of rows": lambda: SerialEnv(2, lambda: Row((2,))),
}


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize("seed", [0, 5])
def test_no_episode_is_played_twice(name: str, seed: int) -> None:
    env, actor, episodes = ENVS[name](), policy(), 7
    vector = {"v": {"module.0.module": torch.ones(2)}}
    options = {"alphas": [1.0], "controls": 1, "episodes": episodes, "seed": seed, "progress": False}
    found = steering_sweep(actor, env, vector, outcomes={"start": starts}, **options)
    assert len(found.of("start").unique()) == episodes
    assert len(returns_of(actor, env, episodes=episodes, max_steps=5, seed=seed).unique()) == episodes
    with ActivationCaching(SITE).prepare(actor) as hooked:
        played = alike_episodes(hooked, env, episodes=episodes, max_steps=5, seed=seed)
    assert len({float(one["observation"][0, 0]) for one in played}) == episodes


CHOICES: dict[str, tuple[Any, int, Any]] = {
    "a number for a one-hot choice": (OneHot(3), 3, Draw),
    "numbers for one-hot choices": (MultiOneHot([3, 3]), 3, Draw),
    "a one-hot choice for a number": (Categorical(3), 3, OneHotCategorical),
    "a one-hot choice for numbers": (MultiCategorical([3, 3]), 3, OneHotCategorical),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_no_choice_is_taken_for_another(name: str, batch: tuple[int, ...]) -> None:
    action, width, kind = CHOICES[name]
    net = TensorDictModule(nn.Linear(2, width), ["observation"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=kind)
    env = Row(batch, action)
    vector = {"v": {"module.0.module": torch.ones(width)}}
    with pytest.raises(InputError, match=r"the environment takes .*(categorical_action_encoding=True)"):
        steering_sweep(actor, env, vector, alphas=[1.0], controls=0, episodes=2, progress=False)
    states = TensorDict({"observation": torch.randn(4, 2)}, batch_size=4)
    with pytest.raises(InputError, match=r"the environment takes"):
        ablate_units(actor, states, SITE, env=env, episodes=2)
    with ActivationCaching(SITE).prepare(actor) as hooked, pytest.raises(InputError, match=r"the environment takes"):
        alike_episodes(hooked, env, episodes=2, max_steps=3)


def test_an_environment_that_lacks_what_the_policy_reads_is_named() -> None:
    net = TensorDictModule(nn.Linear(2, 2), ["observations"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Draw)
    words = "reads 'observations', which this environment does not write; nearest: 'observation'"
    env = Row((1,), Categorical(2))
    with pytest.raises(MissingKeyError, match=words):
        steering_sweep(actor, env, {"v": {"module.0.module": torch.ones(2)}}, alphas=[1.0], controls=0, episodes=2)
    states = TensorDict({"observations": torch.randn(4, 2)}, batch_size=4)
    with pytest.raises(MissingKeyError, match=words):
        ablate_units(actor, states, SITE, env=env, episodes=2)
    with ActivationCaching(SITE).prepare(actor) as hooked, pytest.raises(MissingKeyError, match=words):
        alike_episodes(hooked, env, episodes=2, max_steps=3)


def test_numbers_in_cart_pole_are_refused() -> None:
    net = TensorDictModule(nn.Linear(4, 2), ["observation"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Draw)
    vector = {"v": {"module.0.module": torch.ones(2)}}
    with pytest.raises(InputError, match=r"one-hot: TorchRL takes a number for the first choice"):
        steering_sweep(actor, lambda: GymEnv("CartPole-v1"), vector, episodes=2, progress=False)
    known = steering_sweep(
        actor, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True), vector, alphas=[1.0], controls=0,
        episodes=2, progress=False,
    )  # fmt: skip
    assert known.paired


def test_other_shapes_of_one_number_and_of_other_widths() -> None:
    vector = {"v": {"module.0.module": torch.ones(2)}}
    options: dict[str, Any] = {"alphas": [1.0], "controls": 0, "episodes": 2, "progress": False}
    steering_sweep(policy(), Row((2,)), vector, **options)
    wide = TensorDictSequential(TensorDictModule(nn.Linear(2, 3), ["observation"], ["action"]))
    with pytest.warns(UserWarning, match=r"the shape \(3,\) for each row, and the environment takes \(2,\)"):
        steering_sweep(wide, Row((2,)), {"v": {"module.0.module": torch.ones(3)}}, **options)
    unnamed = policy(keys=("observation", "act"))
    for env in (Row(), Row((2,))):
        with pytest.raises(MissingKeyError, match=r"under 'action', which the policy does not write.*act"):
            steering_sweep(unnamed, env, vector, **options)


class Lottery(Row):
    """Starts from a generator of its own, which a seed replaces as Gymnasium does, or moves."""

    def __init__(self, replaces: bool) -> None:
        super().__init__(action=Categorical(2))
        self.replaces, self.generator = replaces, torch.Generator()

    def _set_seed(self, seed: int | None) -> None:
        if self.replaces:
            self.generator = torch.Generator()
        self.generator.manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        at = torch.rand(2, generator=self.generator)
        return TensorDict({"observation": at, "time": torch.zeros(1)}, [])


class Silent:
    """Answers no question, as what belongs to another process may."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")


def beside_others() -> EnvBase:
    env = Lottery(True)
    env.__dict__["others"] = [Silent(), weakref.proxy(Lottery(True))]  # the second is gone
    return env


def cart_pole() -> EnvBase:
    return GymEnv("CartPole-v1", categorical_action_encoding=True)


DRAWING: dict[str, tuple[Callable[[], EnvBase], int]] = {
    "Gymnasium's": (cart_pole, 4),
    "inside transforms": (lambda: TransformedEnv(cart_pole(), StepCounter(9)), 4),
    "several of them": (lambda: SerialEnv(2, cart_pole), 4),
    "one that is moved": (lambda: Lottery(False), 2),
    "one that is replaced": (lambda: Lottery(True), 2),
    "beside what answers nothing": (beside_others, 2),
}


@pytest.mark.filterwarnings("ignore:.*did not end within max_steps=3")
@pytest.mark.parametrize("name", DRAWING)
def test_what_the_user_plays_afterwards_starts_as_without(name: str) -> None:
    make, width = DRAWING[name]
    net = TensorDictModule(nn.Linear(width, 2), ["observation"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Draw)
    states = TensorDict({"observation": torch.randn(4, width)}, batch_size=4)
    vector = {"v": {"module.0.module": torch.ones(2)}}

    def episodes(env: EnvBase) -> None:
        with ActivationCaching(SITE).prepare(actor) as hooked:
            alike_episodes(hooked, env, episodes=2, max_steps=3)

    plays: list[Callable[[EnvBase], Any]] = [
        lambda env: None,
        episodes,
        lambda env: ablate_units(actor, states, SITE, env=env, episodes=2, max_steps=3),
        lambda env: steering_sweep(
            actor, env, vector, alphas=[1.0], controls=0, episodes=2, max_steps=3, progress=False
        ),
    ]  # fmt: skip
    found = []
    for play in plays:
        env = make()
        env.set_seed(5)
        env.reset()
        play(env)
        found.append(torch.stack([env.reset()["observation"] for _ in range(3)]))
        env.close()
    assert all(torch.equal(one, found[0]) for one in found)
    assert len(found[0].flatten(0, -2).unique(dim=0)) > 2
