"""Functions of the user's of what a chain puts out: a graph that begins there gives what the whole one gives."""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Saliency
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.calls.chains import Record
from tdhook_rl.errors import MissingKeyError, TargetError
from tdhook_rl.policies.drawing_code import may_draw_elsewhere
from tests.chains import Unknown, chain

WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)


def one(outputs: TensorDict, value: Tensor) -> TensorDict:
    return TensorDict({"score": value}, batch_size=outputs.batch_size)


def squares(outputs: TensorDict, _: TensorDict) -> TensorDict:
    return one(outputs, outputs["logits"].square())


def two(outputs: TensorDict, _: TensorDict) -> TensorDict:
    y = outputs["logits"]
    return TensorDict({"a": y[..., 0], "b": y.softmax(-1)[..., 1:]}, batch_size=outputs.batch_size)


def beside(outputs: TensorDict, additional: TensorDict) -> TensorDict:
    return one(outputs, (outputs["logits"] * additional["weight"]).sum(-1))


def weighted(outputs: TensorDict, _: TensorDict) -> TensorDict:
    return one(outputs, outputs["logits"] * WEIGHTS)


def drawing(outputs: TensorDict, _: TensorDict) -> TensorDict:
    return one(outputs, outputs["logits"] * torch.rand_like(outputs["logits"]))


def masking(outputs: TensorDict, _: TensorDict) -> TensorDict:
    y = outputs["logits"]
    y[..., 0] = -torch.inf
    return one(outputs, y.log_softmax(-1)[..., 1])


def differentiating(outputs: TensorDict, _: TensorDict) -> TensorDict:
    y = outputs["logits"]
    (slope,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
    return one(outputs, slope.sum(-1))


def using_up(outputs: TensorDict, _: TensorDict) -> TensorDict:
    y = outputs["logits"].tanh()
    y.sum().backward(retain_graph=True)
    return one(outputs, y)


def undefined(outputs: TensorDict, _: TensorDict) -> TensorDict:
    y = outputs["logits"]
    return one(outputs, torch.where(y[..., 0] > 0, y[..., 0].log(), torch.inf * y[..., 1]))


FUNCTIONS: dict[str, Callable[..., TensorDict]] = {
    one.__name__: one
    for one in (squares, two, beside, weighted, drawing, masking, differentiating, using_up, undefined)
}
#: Those of which the whole graph tells which rows have no number.
WHOLE = ("undefined",)
METHODS: dict[str, Callable[..., Any]] = {
    "saliency": Saliency,
    "a path": functools.partial(IntegratedGradients, n_steps=4, baseline=0.25),
}


def acting(net: nn.Module, acts: bool) -> Any:
    module = TensorDictModule(net, ["observation"], ["logits"])
    return ProbabilisticActor(module, ["logits"], distribution_class=Categorical) if acts else module


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_give_the_bits_of_the_whole_graph(
    name: str, method: str, acts: bool, shape: tuple[int, ...], when: str, records: list[Record]
) -> None:
    torch.manual_seed(0)
    function, net = FUNCTIONS[name], chain()
    rows = TensorDict({"observation": torch.randn(*shape, 6), "weight": torch.randn(*shape, 3)}, batch_size=shape)
    with torch.no_grad():
        batch = acting(net, acts)(rows.double())
    grads = (lambda values, _: values.apply(lambda one: 0.5 * torch.ones_like(one))) if name == "weighted" else None
    made = METHODS[method](
        init_attr_targets=function, init_attr_grads=grads, additional_init_keys=["weight"], when=when
    )
    found = []
    for one in (net, Unknown(net)):
        torch.manual_seed(3)
        with made.prepare(acting(one, acts)) as hooked, torch.no_grad():
            found.append((hooked(batch.clone()) if when == "step" else hooked.annotate(batch))["attr", "observation"])
    assert bool(records) or name in WHOLE
    assert name in WHOLE or bool(found[0].isfinite().all())
    assert torch.equal(*(one.nan_to_num(7.0) for one in found))


def test_what_they_do_wrong_is_said_as_ever() -> None:
    net, data = chain(), TensorDict({"observation": torch.randn(3, 6, dtype=torch.double)}, batch_size=3)

    def absent(outputs: TensorDict, _: TensorDict) -> TensorDict:
        return one(outputs, outputs["logit"])

    for function, error, words in (
        (absent, MissingKeyError, "'logit'.*nearest: 'logits'"),
        (lambda outputs, _: one(outputs, outputs["logits"].detach()), TargetError, "no gradient reaches"),
        (lambda outputs, _: outputs["logits"], TargetError, "must return a TensorDict"),
    ):
        with (
            Saliency(init_attr_targets=function).prepare(acting(net, False)) as hooked,
            pytest.raises(error, match=words),
        ):
            hooked(data.clone())


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
@pytest.mark.parametrize("acts", [False, True])
def test_what_fails_once_is_not_tried_again(acts: bool, kind: type[Exception]) -> None:
    calls: list[int] = []

    def failing(outputs: TensorDict, additional: TensorDict) -> TensorDict:
        calls.append(1)
        if len(calls) == 1:
            raise kind("of the user's own")
        return squares(outputs, additional)

    data = TensorDict({"observation": torch.randn(3, 6, dtype=torch.double)}, batch_size=3)
    with Saliency(init_attr_targets=failing).prepare(acting(chain(), acts)) as hooked:
        with pytest.raises(kind, match="of the user's own"):
            hooked(data.clone())
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["step", "batch"])
def test_one_that_wants_the_whole_graph_is_given_it(when: str) -> None:
    net = chain()

    def sensitivity(outputs: TensorDict, _: TensorDict) -> TensorDict:
        (slope,) = torch.autograd.grad(outputs["logits"].sum(), net[0].weight, create_graph=True)
        return one(outputs, outputs["logits"].sum(-1) * slope.square().sum())

    data = TensorDict({"observation": torch.randn(3, 6, dtype=torch.double)}, batch_size=3)
    found = []
    for part in (net, Unknown(net)):
        with Saliency(init_attr_targets=sensitivity, when=when).prepare(acting(part, False)) as hooked:
            found.append((hooked(data.clone()) if when == "step" else hooked.annotate(data))["attr", "observation"])
    assert torch.equal(*found)


@pytest.mark.parametrize("acts", [False, True])
def test_they_see_the_outputs_and_no_more(acts: bool) -> None:
    seen: list[set[str]] = []

    def noting(outputs: TensorDict, additional: TensorDict) -> TensorDict:
        seen.append({*outputs.keys(), *additional.keys()})
        return squares(outputs, additional)

    net, data = chain(), TensorDict({"observation": torch.randn(3, 6, dtype=torch.double), "other": torch.ones(3)}, [3])
    for policy in (acting(net, acts), acting(Unknown(net), acts)):
        with Saliency(init_attr_targets=noting).prepare(policy) as hooked:
            hooked(data.clone())
    assert seen == [{"logits"} | ({"action"} if acts else set())] * 2


# ------------------------------------------------------------------ what they may draw from


NET = nn.Linear(3, 1)
HALF, RANDOM, GENERATOR, DRAWN = 0.5, random, np.random.default_rng(0), [random.random]


def helped(x: Tensor) -> Tensor:
    return HALF * x


def helped_by_numpy(x: Tensor) -> Tensor:
    return x * np.random.rand()


class Stored:
    def __call__(self, x: Tensor) -> Tensor:
        return x * random.random()


def imports_inside(x: Tensor) -> Tensor:
    import random as hidden

    return x * hidden.random()


def with_a_default(x: Tensor, draw: Any = random.random) -> Tensor:
    return x * draw()


@functools.wraps(torch.nn.functional.relu)
def called_as_torchs(x: Tensor) -> Tensor:
    return x * np.random.rand()


def closed_over(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (value() if callable(value) else value)


QUIET: list[Callable[..., Any]] = [
    torch.nn.functional.gelu, torch.nn.functional.cross_entropy,
    squares, two, beside, drawing, masking, differentiating, helped, torch.relu, operator.neg, closed_over(2.0),
    closed_over(torch.ones(())), closed_over(helped), functools.partial(torch.sum, dim=-1), lambda x: NET(x),
    lambda x: math.pi * torch.nn.functional.relu(x), lambda x: [helped(one) for one in x], lambda x: x.sum().item(),
]  # fmt: skip
DRAWING: list[Callable[..., Any]] = [
    called_as_torchs, torch.no_grad()(helped_by_numpy), torch.no_grad()(called_as_torchs),
    helped_by_numpy, imports_inside, with_a_default, closed_over(random.random), Stored(), random.gauss,
    functools.partial(lambda draw, x: x * draw(), np.random.rand), lambda x: x * RANDOM.random(),
    lambda x: x * GENERATOR.random(), lambda x: x * DRAWN[0](), lambda x: helped(helped_by_numpy(x)),
    lambda x: eval("x"), lambda x: [one * np.random.rand() for one in x], Stored().__call__, closed_over(Stored()),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(QUIET)))
def test_code_that_names_torch_alone_draws_from_its_generator(index: int) -> None:
    assert not may_draw_elsewhere(QUIET[index])


@pytest.mark.parametrize("index", range(len(DRAWING)))
def test_other_code_may_draw_elsewhere(index: int) -> None:
    assert may_draw_elsewhere(DRAWING[index])
