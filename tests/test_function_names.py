"""Which function it is: others have other names, the same have the same in every process; resumption goes by that."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import LinearProbe, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.files.functions import UNTOLD, in_words, named_function, number_of
from tdhook_rl.latent.gates import AtSteps, ProbeGate
from tdhook_rl.replay import analyze
from tdhook_rl.replay.manifest import described
from tdhook_rl.sweeps import steering_sweep
from tdhook_rl.targets import Target

FACTOR, TABLE, HELPER = 2.0, {"a": [1, 2]}, None


def helped(x: Any) -> Any:
    return x if HELPER is None else HELPER(x)


def by_global(x: Any) -> Any:
    return x * FACTOR + len(TABLE["a"])


def by_helper(x: Any) -> Any:
    return helped(x) + 1


def outer(value: Any) -> Callable[..., Any]:
    return lambda x: (x, value)


def nested(value: Any) -> Callable[..., Any]:
    def inner(x: Any) -> Any:
        return [value for _ in range(x)]

    return lambda x: inner(x)


def defaulted(value: Any) -> Callable[..., Any]:
    def function(x: Any, y: Any = value) -> Any:
        return x, y

    return function


def by_keyword(value: Any) -> Callable[..., Any]:
    def function(x: Any, *, y: Any = value) -> Any:
        return x, y

    return function


def plain(x: Any, y: Any = None) -> Any:
    return x


def wrapped(value: Any) -> Callable[..., Any]:
    return functools.lru_cache(outer(value))


class Held:
    limit = 1

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Any) -> Any:
        return x, self.value

    def method(self, x: Any) -> Any:
        return x, self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Any) -> Any:
        return x, self.value


@dataclass(frozen=True)
class Data:
    value: Any

    def __call__(self, x: Any) -> Any:
        return x, self.value


class Loop:
    def __init__(self, value: Any) -> None:
        self.value, self.itself = value, self

    def __call__(self, x: Any) -> Any:
        return self.itself.value


def linear(value: float) -> nn.Module:
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.fill_(value)
        net.bias.zero_()
    return net


#: What makes a function that has a value at hand.
MAKERS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "closure": outer, "closure of a closure": nested, "default": defaulted, "keyword default": by_keyword,
    "partial": lambda value: functools.partial(plain, value),
    "partial by keyword": lambda value: functools.partial(plain, y=value),
    "partial of a partial": lambda value: functools.partial(functools.partial(plain, y=value), 1),
    "bound method": lambda value: Held(value).method, "callable object": Held, "slots": Slotted, "dataclass": Data,
    "cycle": Loop, "wrapped": wrapped, "in a list": lambda value: outer([{"a": (value,)}]),
    "another function": lambda value: outer(outer(value)), "target": lambda value: Target("mine", outer(value)),
}  # fmt: skip
#: Two values of each kind, made anew each time.
VALUES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "int": (lambda: 1, lambda: 2), "float": (lambda: 0.1, lambda: 0.1 + 1e-16), "type": (lambda: 1, lambda: 1.0),
    "text": (lambda: "a", lambda: "b"), "none": (lambda: None, lambda: False),
    "tensor": (lambda: torch.arange(3.0), lambda: torch.arange(3.0) + torch.tensor([0, 0, 1e-6])),
    "dtype": (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.float64)),
    "array": (lambda: np.arange(3), lambda: np.arange(3)[::-1]),
    "set": (lambda: {"a", "b", "c"}, lambda: {"a", "b", "d"}),
    "mapping": (lambda: {"a": 1, "b": 2}, lambda: {"a": 2, "b": 1}),
    "data": (lambda: TensorDict({"a": torch.ones(2)}, [2]), lambda: TensorDict({"a": torch.zeros(2)}, [2])),
    "network": (lambda: linear(1.0), lambda: linear(2.0)),
    "options of a network": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
    "library": (lambda: torch.tanh, lambda: torch.sigmoid), "ufunc": (lambda: np.sin, lambda: np.cos),
    "class": (lambda: nn.ReLU, lambda: nn.Tanh), "builtin": (lambda: [1].append, lambda: [2].append),
}  # fmt: skip


def names() -> list[str]:
    return [named_function(make(value())) for make in MAKERS.values() for pair in VALUES.values() for value in pair]


def test_each_is_told_from_the_other_and_not_from_itself() -> None:
    for (how, make), (kind, (one, other)) in itertools.product(MAKERS.items(), VALUES.items()):
        found = named_function(make(one()))
        assert found == named_function(make(one())), (how, kind)
        assert found != named_function(make(other())), (how, kind)
        assert UNTOLD not in found, (how, kind)


@pytest.mark.slow
def test_they_are_the_same_in_another_process() -> None:
    code = "from tests.test_function_names import names; print('\\n'.join(names()))"
    options = {"capture_output": True, "text": True, "check": True, "cwd": Path(__file__).parents[1]}
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=env, **options)  # type: ignore[call-overload]
    assert found.stdout.splitlines() == names()


def test_code_globals_and_helpers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_function(lambda x: x + 1) != named_function(lambda x: x + 2)
    assert named_function(lambda x: x in {"a", "b"}) == named_function(lambda x: x in {"a", "b"})
    assert named_function(lambda x: [y + 1 for y in x]) != named_function(lambda x: [y + 2 for y in x])
    before = named_function(by_global), named_function(by_helper), named_function(outer)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    changed = named_function(by_global), named_function(by_helper), named_function(outer)
    assert [one == other for one, other in zip(before, changed, strict=True)] == [False, True, True]
    monkeypatch.setitem(globals(), "HELPER", outer(1))
    assert named_function(by_helper) != before[1]
    monkeypatch.undo()
    assert named_function(by_global) == before[0]
    of_object, of_class = named_function(Held(1)), named_function(lambda x: Held(x))
    monkeypatch.setattr(Held, "limit", 2)
    assert named_function(Held(1)) != of_object
    assert named_function(lambda x: Held(x)) == of_class  # what a class counts is not what a function of it is
    monkeypatch.setattr(Held, "__call__", lambda self, x: self.value)
    assert named_function(lambda x: Held(x)) != of_class


@pytest.mark.parametrize(
    "held", [threading.Lock, lambda: torch.Generator(), lambda: iter([1]), lambda: np.random.default_rng(0), object]
)
def test_what_cannot_be_told_is_said(held: Callable[[], Any]) -> None:
    said = named_function(outer([held()]))
    assert said.endswith(f"(holds a {type(held()).__qualname__}, which {UNTOLD})")


def test_options_in_words() -> None:
    probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), path="0")
    other = LinearProbe(weight=torch.eye(2) * 2, bias=torch.zeros(2), path="0")
    assert in_words(ProbeGate(probe, above=0.9)) != in_words(ProbeGate(other, above=0.9))
    assert in_words([AtSteps(range(3)), "key", None]) == "[AtSteps(steps=range(0, 3), key='step_count'), 'key', None]"


def test_long_options_are_told_to_their_end() -> None:
    one, other = [[number] for number in range(500)], [[number] for number in range(500)]
    other[-1] = [7]
    assert described(one) != described(other)
    assert described("a" * 500) != described("a" * 499 + "b")
    assert described({str(number): 0 for number in range(500)}) != described({str(number): 1 for number in range(500)})
    assert len(described(one)) == 201
    assert number_of(one) == number_of([[number] for number in range(500)])


def test_a_sweep_does_not_go_on_with_another_function(tmp_path: Path) -> None:
    actor = make_actor()

    def play(limit: Any, **options: Any) -> Any:
        given = {"outcomes": {"mine": lambda episodes: (episodes["mask"].sum(-1) > limit).double()}} | options
        return steering_sweep(
            actor, lambda: CueCorners(batch_size=[2], seed=0), {"v": {FC2: torch.ones(64)}}, alphas=[1.0],
            controls=0, episodes=2, folder=tmp_path, **given,
        )  # fmt: skip

    play(1)
    play(1)
    with pytest.raises(InputError, match="holds a sweep with another measured"):
        play(2)
    with pytest.raises(InputError, match="holds a sweep with another when"):
        play(1, when=functools.partial(plain, y=3))
    with pytest.raises(InputError, match="holds a sweep with another measured"):
        play(iter([1]))


def test_what_a_sweep_cannot_tell_it_says(tmp_path: Path) -> None:
    lock, actor = threading.Lock(), make_actor()

    def locked(episodes: TensorDict) -> torch.Tensor:
        with lock:
            return episodes["mask"].sum(-1).double()

    def play() -> Any:
        return steering_sweep(
            actor, lambda: CueCorners(batch_size=[2], seed=0), {"v": {FC2: torch.ones(64)}}, alphas=[1.0],
            controls=0, episodes=2, folder=tmp_path, outcomes=locked,
        )  # fmt: skip

    play()
    with pytest.warns(UserWarning, match=r"goes on as the same: .*locked .*holds a lock"):
        play()


def test_an_analysis_does_not_go_on_with_another_function(tmp_path: Path) -> None:
    actor = make_actor()
    rows = CueCorners(batch_size=[4], seed=0).rollout(5, actor, break_when_any_done=False).reshape(-1)

    def again(tiny: float) -> Any:
        with Saliency(target=lambda run: run.outputs["logits"][..., 0] * (1 + tiny)).prepare(actor) as hooked:
            return analyze(hooked, rows, tmp_path / "results")

    again(0.0)
    again(0.0)
    with pytest.raises(ArtifactError, match="other methods or options"):
        again(1e-9)
