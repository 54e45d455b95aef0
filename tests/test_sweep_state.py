"""What transforms, workers and batch statistics hold goes from one condition to no other, nor to training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import (
    CatFrames,
    EnvBase,
    ObservationNorm,
    ParallelEnv,
    SerialEnv,
    TimeMaxPool,
    TrajCounter,
    Transform,
    TransformedEnv,
    VecNorm,
    VecNormV2,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import SteeringVectors
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.environment_state import same_state
from tdhook_rl.rollout import alike_episodes
from tdhook_rl.sweeps import SteeringVector, SweepResult, ablate_units, steering_sweep

STEPS, EPISODES = 7, 3


class Drift(EnvBase):
    """A point that is pushed, in any batch; an episode is over where it leaves, or after seven steps."""

    def __init__(self, batch: tuple[int, ...] = (), locked: bool = True) -> None:
        super().__init__(batch_size=batch)
        self._batch_locked = locked
        shape = torch.Size(batch)
        at = Unbounded((*shape, 4))
        self.observation_spec = Composite(observation=at, at=at.clone(), time=Unbounded((*shape, 1)), shape=shape)
        self.action_spec = Unbounded((*shape, 2))
        self.reward_spec = Unbounded((*shape, 1))
        self.done_spec = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        self.set_seed(0)

    def _set_seed(self, seed: int | None) -> None:
        self.numbers = torch.Generator().manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        batch = self.batch_size if self._batch_locked or tensordict is None else tensordict.batch_size
        at = 0.4 * torch.randn(*batch, 4, generator=self.numbers)
        return TensorDict({"observation": at.clone(), "at": at, "time": torch.zeros(*batch, 1)}, batch_size=batch)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        push = tensordict["action"]
        at = 1.15 * tensordict["at"] + 0.3 * torch.cat([push, -push], -1)
        time = tensordict["time"] + 1
        over = (at[..., :1].abs() > 1.0) | (time >= STEPS)
        found = {"observation": at.clone(), "at": at, "time": time, "reward": at[..., 1:2], "done": over}
        return TensorDict(found, batch_size=tensordict.batch_size)


class Worn(Transform):
    """A transform of somebody's own: sensors that fade with every step that was ever taken, in whatever row."""

    def __init__(self) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.register_buffer("taken", torch.zeros(()))

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.taken += next_tensordict.numel()
        return next_tensordict.set("observation", next_tensordict["observation"] * torch.exp(-self.taken / 50))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "VecNorm": lambda: VecNorm(in_keys=["observation"]),
    "VecNormV2": lambda: VecNormV2(in_keys=["observation"]),
    "of rewards": lambda: VecNormV2(in_keys=["reward"]),
    "CatFrames": lambda: CatFrames(N=2, dim=-1, in_keys=["observation"]),
    "TimeMaxPool": lambda: TimeMaxPool(in_keys=["observation"], T=2),
    "TrajCounter": TrajCounter,
    "of one's own": Worn,
}
#: Those whose state a reset does not begin anew.
MOVING = ("VecNorm", "VecNormV2", "of rewards", "of one's own")


def of_rows(transform: Callable[[], Transform]) -> EnvBase:
    return TransformedEnv(Drift(locked=False), transform())


def inside(transform: Callable[[], Transform]) -> EnvBase:
    return SerialEnv(2, lambda: TransformedEnv(Drift(), transform()))


PLACES: dict[str, Callable[[Callable[[], Transform]], EnvBase]] = {
    "of any rows": of_rows,
    "of one": lambda transform: TransformedEnv(Drift(), transform()),
    "of a batch": lambda transform: TransformedEnv(Drift((2,)), transform()),
    "over workers": lambda transform: TransformedEnv(SerialEnv(2, Drift), transform()),
    "in workers": inside,
}


def actor(features: int, *between: nn.Module) -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(features, 16), *between, nn.Tanh(), nn.Linear(16, 2))
    return TensorDictModule(net, in_keys=["observation"], out_keys=["action"])


def held(env: EnvBase) -> list[Any]:
    """The numbers in all transforms, wherever they are."""
    if isinstance(env, TransformedEnv):
        return [copy.deepcopy(env.state_dict()), *held(env.base_env)]
    return [copy.deepcopy(env.state_dict())] if isinstance(env, SerialEnv) else []


def by_hand(make: Callable[[], EnvBase], policy: nn.Module, vector: SteeringVector, alpha: float) -> Tensor:
    """Returns of first episodes; each rollout is in an environment that was made and used as the first one."""
    steered = SteeringVectors(vector, alpha=alpha).prepare(policy, return_context=False)
    found: list[Tensor] = []
    while sum(map(len, found)) < EPISODES:
        env = make()
        env.set_seed(len(found) * max(env.batch_size.numel(), 1))
        with torch.no_grad():
            played = env.rollout(STEPS, steered, break_when_any_done=not env.batch_size)
        env.close()
        played = played if env.batch_size else played[None]
        done = played["next", "done"].squeeze(-1).long()
        first = done.cumsum(-1) - done == 0
        found.append((played["next", "reward"].squeeze(-1).double() * first).sum(-1))
    return torch.cat(found)[:EPISODES]


def used(place: str, transform: str) -> EnvBase:
    """An environment as training leaves it: transforms have seen some steps."""
    env = PLACES[place](TRANSFORMS[transform])
    torch.manual_seed(1)
    env.set_seed(1)
    env.rollout(4, break_when_any_done=False)
    return env


#: Every transform where rows are free and where they are not, one in every place, one that keeps rows over workers.
CASES = [
    *((one, place) for one in TRANSFORMS for place in ("of any rows", "of one")),
    *(("VecNormV2", place) for place in ("of a batch", "over workers", "in workers")),
    ("CatFrames", "over workers"),
]


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize(("transform", "place"), CASES)
def test_conditions_begin_with_what_transforms_held(transform: str, place: str) -> None:
    """Strengths are rollouts by hand in an environment of their own, and the user's is left as it was."""
    env = used(place, transform)
    policy = actor(env.reset()["observation"].shape[-1])
    vector = SteeringVector(vector=2 * torch.ones(16), path="module.0")
    env = used(place, transform)
    before = held(env)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found = steering_sweep(
            policy, env, vector, alphas=[1.0], controls=1, episodes=EPISODES, max_steps=STEPS, progress=False
        )
    assert found.paired
    if place == "of any rows":  # those that mix rows, or keep as many as there are, are not played in rows
        assert found.facts["layout"].startswith("rows") == (transform == "TrajCounter")
    else:
        for alpha in (0.0, 1.0):
            right = by_hand(lambda: used(place, transform), policy, vector, alpha)
            torch.testing.assert_close(found.of("return", alpha=alpha), right, rtol=0, atol=1e-5)
    if transform in MOVING:
        torch.testing.assert_close(held(env), before, rtol=0, atol=0)
    env.close()


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("transform", ["VecNorm", "CatFrames"])
def test_what_has_never_played_begins_by_the_seed(transform: str) -> None:
    """Statistics of an environment that is new follow from no generator of the user's, and leave it as it was."""
    found = []
    for seed in (1, 2):
        env = PLACES["of one"](TRANSFORMS[transform])
        env.set_seed(seed)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        policy = actor(8 if transform == "CatFrames" else 4)
        torch.set_rng_state(before)
        vector = SteeringVector(vector=2 * torch.ones(16), path="module.0")
        played = steering_sweep(policy, env, vector, alphas=[1.0], controls=1, episodes=2, max_steps=STEPS)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(played.values)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def counted() -> EnvBase:
    return TransformedEnv(Drift(), VecNormV2(in_keys=["observation"]))


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_statistics_in_worker_processes() -> None:
    """As in the very same environment in this process, and left as they were."""
    vector = SteeringVector(vector=2 * torch.ones(16), path="module.0")
    values = []
    for kind, options in ((SerialEnv, {}), (ParallelEnv, {"mp_start_method": "fork"})):
        env = kind(2, counted, **options)
        try:
            torch.manual_seed(1)
            env.set_seed(1)
            env.rollout(4, break_when_any_done=False)
            before = copy.deepcopy(env.state_dict())
            found = steering_sweep(actor(4), env, vector, alphas=[1.0], controls=0, episodes=4, max_steps=STEPS)
            assert found.paired
            torch.testing.assert_close(dict(env.state_dict()), dict(before), rtol=0, atol=0)
            values.append(found.values["return"])
        finally:
            env.close()
    torch.testing.assert_close(values[0], values[1])


def test_workers_that_were_never_asked_for_anything() -> None:
    for transform in ("VecNormV2", "CatFrames"):
        env = ParallelEnv(1, partial(PLACES["of one"], TRANSFORMS[transform]), mp_start_method="fork")
        try:
            with same_state(env) as put_back:
                before = copy.deepcopy(env.state_dict())
                env.rollout(3)
                put_back()
                torch.testing.assert_close(dict(env.state_dict()), dict(before), rtol=0, atol=0)
        finally:
            env.close()


def _observed() -> Transform:
    return ObservationNorm(0.0, 1.0, in_keys=["observation"])


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize(
    ("transform", "place"),
    [*((one, "of one") for one in (*TRANSFORMS, "ObservationNorm", "frozen")), ("VecNormV2", "over workers"),
     ("VecNormV2", "in workers"), ("CatFrames", "in workers")],
)  # fmt: skip
def test_a_sweep_goes_on_from_what_was_held(transform: str, place: str, tmp_path: Path) -> None:
    """What a reset begins anew may differ; statistics may not, also those that play moves no more."""
    make = {**TRANSFORMS, "ObservationNorm": _observed, "frozen": TRANSFORMS["VecNormV2"]}[transform]

    def made(steps: int) -> EnvBase:
        env = PLACES[place](make)
        torch.manual_seed(1)
        env.set_seed(1)
        env.rollout(steps, break_when_any_done=False)
        for one in transforms(env):
            if transform == "frozen":
                one.freeze()
            if transform == "ObservationNorm":
                one.scale.fill_(float(steps))
        return env

    def play(env: EnvBase, stops: int = 0) -> SweepResult:
        def stop(done: int, of: int) -> None:
            if done == stops:
                raise KeyboardInterrupt

        return steering_sweep(
            policy, env, vector, alphas=[1.0], controls=1, episodes=2, max_steps=3, progress=stop, folder=folder
        )

    folder: Path | None = None
    policy = actor(made(1).reset()["observation"].shape[-1])
    vector = SteeringVector(vector=2 * torch.ones(16), path="module.0")
    whole = play(made(2))
    folder = tmp_path
    with pytest.raises(KeyboardInterrupt):
        play(made(2), stops=2)
    said = "another environment" if transform == "ObservationNorm" else "as they were when the sweep began"
    if transform in (*MOVING, "ObservationNorm", "frozen"):
        with pytest.raises(InputError, match=said):
            play(made(5))
    elif transform != "TrajCounter":  # whose count a reset moves on
        torch.testing.assert_close(play(made(5)).values, whole.values, rtol=0, atol=0)
    torch.testing.assert_close(play(made(2)).values, whole.values, rtol=0, atol=0)


def transforms(env: EnvBase) -> list[Any]:
    if isinstance(env, SerialEnv):
        return [one for inner in env._envs for one in transforms(inner)]
    return [env.transform, *transforms(env.base_env)] if isinstance(env, TransformedEnv) else []


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("layer", ["statistics", "dropout"])
def test_rows_of_a_policy_that_meet_are_not_played_together(layer: str) -> None:
    """Batch normalisation in training would mix the conditions; what it counts stays what training made of it."""
    policy = actor(4, nn.BatchNorm1d(16) if layer == "statistics" else nn.Dropout(0.5))
    policy.train()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    vector = SteeringVector(vector=2 * torch.ones(16), path="module.0")
    options: dict[str, Any] = {"controls": 1, "episodes": 4, "max_steps": 3, "progress": False}
    found, more = (
        steering_sweep(policy, Drift(locked=False), vector, alphas=alphas, **options) for alphas in ([1.0], [1.0, 4.0])
    )
    assert found.paired
    assert found.facts["layout"].startswith("one condition")
    for alpha in (0.0, 1.0):  # whatever else is played
        assert torch.equal(found.of("return", alpha=alpha), more.of("return", alpha=alpha))
    torch.testing.assert_close(dict(policy.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("transform", MOVING)
def test_players_and_ablations_leave_them_alone(transform: str) -> None:
    env, policy = used("of one", transform), actor(4)
    before = held(env)
    with SteeringVectors({"module.0": torch.ones(16)}).prepare(policy) as hooked:
        first, again = (alike_episodes(hooked, env, episodes=3, max_steps=STEPS) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["observation"], other["observation"])
    torch.testing.assert_close(held(env), before, rtol=0, atol=0)
    data = Drift((2,)).rollout(9, policy, break_when_any_done=False)
    before = held(env)
    tables = [ablate_units(policy, data, sites="module.0", most=2, env=env, episodes=3) for _ in range(2)]
    assert tables[0].records() == tables[1].records()
    torch.testing.assert_close(held(env), before, rtol=0, atol=0)
