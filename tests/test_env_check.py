"""check_concept_env finds what is wrong, says what was skipped, and takes environments that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, GymEnv, StepCounter, TransformedEnv

from tdhook_rl.envs import Concept, CueCorners, GymnasiumFace, TMaze, add_info_labels, check_concept_env, register
from tdhook_rl.errors import EnvCheckError, InputError


class WrongLabel(TMaze):
    """The junction is announced a step early."""

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"junction": (at["elapsed"] >= self.distractor_steps - 1).long()}


class WrongObservation(TMaze):
    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        return super()._observe(at).flip(-1)


class StalePair(TMaze):
    """The cue is changed and the light with it."""

    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        return super()._changed(at, concept, index) | {"light": 1 - at["light"]}


class DeadPair(CueCorners):
    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        return {}


class WidePair(CueCorners):
    """Two lights instead of one."""

    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        return {"bits": 1 - at["bits"]}


class GlobalRandomness(TMaze):
    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        drawn = torch.randint(0, 2, (*shape, 4), device=self.device)
        return dict(zip(("cue", "unneeded_cue", "light", "episode_coin"), drawn.unbind(-1), strict=True))


class WrongType(TMaze):
    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        return super()._observe(at).double()


class OutOfRange(TMaze):
    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"junction": at["elapsed"]}


class Undeclared(TMaze):
    def _describe(self, at: Mapping[str, Tensor]) -> TensorDict:
        data = super()._describe(at)
        data["concept"].set("mood", torch.zeros_like(at["elapsed"]))
        return data


class DescribesNothing(TMaze):
    def describe_slowly(self, **at: Any) -> dict[str, Any]:
        return {}


class DescribesAnother(TMaze):
    def describe_slowly(self, **at: Any) -> dict[str, Any]:
        return {**super().describe_slowly(**at), "mood": 1}


class DescribesInAList(TMaze):
    def describe_slowly(self, **at: Any) -> Any:
        return list(super().describe_slowly(**at).items())


class UnboundedFace(TMaze):
    gymnasium_id = "tests/UnboundedFace-v0"

    def _observation_spec(self, shape: torch.Size) -> TensorSpec:
        return Bounded(-torch.inf, torch.inf, shape=(*shape, self.observation_features))


register(UnboundedFace)


@pytest.mark.parametrize(
    ("env", "failed", "message"),
    [
        (WrongLabel, {"slow reference", "pairs"}, "junction is 1, described as 0 in the state"),
        (WrongObservation, {"slow reference", "pairs"}, "observation is"),
        (StalePair, {"pairs"}, "cue: light changes with it and is not declared to follow"),
        (DeadPair, {"pairs"}, r"bits\[0\] is the same in 256 of 256 pairs"),
        (WidePair, {"pairs"}, r"bits\[0\]: other elements of bits change with it"),
        (GlobalRandomness, {"determinism"}, "two rollouts with seed 0 and the same actions differ"),
        (WrongType, {"specs"}, "dtype|AssertionError"),
        (OutOfRange, {"declared labels", "slow reference"}, "junction: 0 or 1, got 0 to 8"),
        (Undeclared, {"specs", "declared labels"}, r"present but not declared: \['mood'\]"),
        (DescribesNothing, {"slow reference", "pairs"}, r"leaves out \['cue', .*and describes \[\]"),
        (DescribesAnother, {"slow reference", "pairs"}, r"leaves out \[\] and describes \['mood'\]"),
        (DescribesInAList, {"slow reference", "pairs"}, "returns a dictionary of labels by name, got \\["),
        (UnboundedFace, {"Gymnasium's check"}, "infinity"),
    ],
)
def test_what_is_wrong_is_found(env: type[EnvBase], failed: set[str], message: str) -> None:
    with pytest.raises(EnvCheckError, match=message) as caught:
        check_concept_env(env(batch_size=[6]))
    lines = {line[2:21].strip(): line[21:] for line in str(caught.value).splitlines()[1:]}
    assert {name for name, line in lines.items() if line.startswith("failed")} >= failed
    assert len(lines) == 6  # the other checks were made all the same


class Counter(EnvBase):
    """A user's environment: not a ConceptEnv, and only part of the protocol."""

    concepts: ClassVar[dict[str, Concept]] = {
        "even": Concept(role="needed", meaning="the count is even", classes=2, moves=("count",))
    }
    variables: ClassVar[dict[str, str]] = {"count": "count"}

    def __init__(self, batch_size: Sequence[int] = ()) -> None:
        super().__init__(batch_size=batch_size)
        shape = self.batch_size
        self.observation_spec = Composite(
            count=Unbounded(shape=shape, dtype=torch.long),
            concept=Composite({name: one.spec(shape) for name, one in self.concepts.items()}, shape=shape),
            shape=shape,
        )
        self.state_spec = Composite(count=Unbounded(shape=shape, dtype=torch.long), shape=shape)
        self.action_spec = Categorical(2, shape=shape)
        self.reward_spec = Unbounded(shape=(*shape, 1))

    def _at(self, count: Tensor) -> TensorDict:
        even = TensorDict({"even": 1 - count % 2}, batch_size=count.shape)
        return TensorDict({"count": count, "concept": even}, batch_size=count.shape)

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        return self._at(torch.zeros(self.batch_size, dtype=torch.long))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        count = tensordict["count"] + tensordict["action"]
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return self._at(count).update({"reward": torch.zeros(*self.batch_size, 1), "done": done})

    def _set_seed(self, seed: int | None) -> None: ...

    def describe_slowly(self, *, count: int) -> dict[str, int]:
        return {"even": {0: 1, 1: 0}[count % 2]}


def test_a_users_environment_is_checked_as_far_as_it_goes() -> None:
    outcomes = {name: (outcome, detail) for name, outcome, detail in check_concept_env(Counter([3])).rows}
    assert outcomes["slow reference"][0] == outcomes["declared labels"][0] == "passed"
    assert outcomes["pairs"] == ("skipped", "the environment has no paired")
    assert outcomes["Gymnasium's check"] == ("skipped", "the environment has no gymnasium_id")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TransformedEnv(TMaze(batch_size=[4]), StepCounter()),
        lambda: add_info_labels(GymEnv("tdhook_rl/TMaze-v0"), dict(TMaze.concepts)),
    ],
)
def test_wrapped_environments_are_checked(make: Callable[[], EnvBase]) -> None:
    assert check_concept_env(make()).failed == ()


def test_other_things_are_refused() -> None:
    with pytest.raises(InputError, match="TorchRL environments, got GymnasiumFace"):
        check_concept_env(gymnasium.make("tdhook_rl/TMaze-v0").unwrapped)
    with pytest.raises(InputError, match="a concept is needed, unneeded, control; got role 'useful'"):
        Concept(role="useful", meaning="")
    with pytest.raises(InputError, match="2 roles for 3 elements"):
        Concept(role=("needed", "control"), meaning="", size=3, classes=2)
    assert isinstance(gymnasium.make("tdhook_rl/TMaze-v0").unwrapped, GymnasiumFace)
