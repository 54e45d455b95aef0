"""Actors that decide by the output of a chain: explained without the graph of the chain, with the numbers of autograd.

What they would be explained by otherwise is the reference: the policy run again, seen by autograd. A module of no known
class in the place of a layer leaves it to that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Module
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import IndependentNormal, MaskedCategorical, ProbabilisticActor, QValueActor, TanhNormal
from torchrl.modules.distributions import OneHotCategorical

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.calls.chains import Record
from tdhook_rl.errors import TargetError, TdhookError
from tests.chains import chain

ROWS = 7


class Usual(nn.Tanh):
    """What is computed by a subclass is not known."""


def _net(kind: type[nn.Module], outputs: int) -> nn.Sequential:
    return nn.Sequential(*chain(kind)[:-1], nn.Linear(16, outputs)).double()


def discrete(kind: type[nn.Module], family: Any, **options: Any) -> Any:
    module = Module(_net(kind, 3), ["observation"], ["logits"])
    return ProbabilisticActor(module, ["logits"], distribution_class=family, return_log_prob=True, **options)


def continuous(kind: type[nn.Module], family: Any, **kwargs: Any) -> Any:
    net = nn.Sequential(*_net(kind, 4), NormalParamExtractor())
    module = Module(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(module, ["loc", "scale"], distribution_class=family, distribution_kwargs=kwargs)


def plain_sequence(kind: type[nn.Module]) -> Any:
    module = Module(_net(kind, 3), ["observation"], ["logits"])
    draw = ProbabilisticTensorDictModule(["logits"], ["chosen"], distribution_class=D.Categorical)
    return ProbabilisticTensorDictSequential(module, draw)


def q_network(kind: type[nn.Module], action_space: str) -> Any:
    return QValueActor(_net(kind, 3), in_keys=["observation"], action_space=action_space)


ACTORS = {
    "categorical": lambda kind: discrete(kind, D.Categorical),
    "one-hot of torch": lambda kind: discrete(kind, D.OneHotCategorical),
    "one-hot": lambda kind: discrete(kind, OneHotCategorical),
    "one-hot, other gradients": lambda kind: discrete(
        kind, OneHotCategorical, distribution_kwargs={"grad_method": OneHotCategorical(torch.ones(2)).grad_method}
    ),
    "bernoulli": lambda kind: discrete(kind, D.Bernoulli),
    "another key": plain_sequence,
    "tanh normal": lambda kind: continuous(kind, TanhNormal),
    "tanh normal in bounds": lambda kind: continuous(kind, TanhNormal, low=-2.0, high=1.0),
    "tanh normal in bounds of tensors": lambda kind: continuous(kind, TanhNormal, low=torch.tensor([-2.0, -1.0])),
    "tanh normal with a tanh": lambda kind: continuous(kind, TanhNormal, tanh_loc=True),
    "normal": lambda kind: continuous(kind, IndependentNormal),
    "q": lambda kind: q_network(kind, "one-hot"),
    "q of indices": lambda kind: q_network(kind, "categorical"),
}
TARGETS = {
    "default": None,
    "log-prob": targets.taken_action_log_prob(),
    "entropy": targets.entropy(),
    "chosen logit": targets.chosen_logit(),
    "logit": targets.logit(1),
    "margin": targets.margin(),
    "chosen q": targets.chosen_q(),
    "margin of values": targets.margin("action_value"),
    "sum": targets.output_sum(),
    "two": {"one": targets.logit(0), "other": targets.margin()},
}


#: Of what a normal distribution has, which the last layer makes of what the others put out.
PARAMETERS = {
    "mean": targets.logit(0, "loc"),
    "scale": targets.logit(1, "scale"),
    "other mean": targets.logit(1, "loc"),
}


#: An actor of known layers; one with a layer of an unknown class, whose draw is known; and one of which nothing is.
VARIANTS = (nn.Tanh, True), (Usual, True), (Usual, False)


def _each(name: str, method: Any, batch: tuple[int, ...] = (ROWS,)) -> list[Any]:
    """What is found for each of the variants of an actor, or the errors; the last is the reference."""
    found: list[Any] = []
    for kind, is_known in VARIANTS:
        torch.manual_seed(0)
        actor = ACTORS[name](kind)
        torch.manual_seed(1)
        data = TensorDict({"observation": torch.randn(*batch, 6, dtype=torch.double)}, batch_size=batch)
        with method.prepare(actor) as hooked:
            if not is_known:
                hooked._hooked.decider = None
            with torch.no_grad():
                data = hooked(data)
            try:
                found.append(hooked.annotate(data.exclude("attr", "computed"), on_mismatch="raise")["attr"])
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


#: Every actor and every target meets each of them; all three together are slow.
SHAPES: tuple[tuple[int, ...], ...] = ((ROWS,), (3, 2), ())


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("target", [*TARGETS, *PARAMETERS])
@pytest.mark.parametrize("name", ACTORS)
def test_the_numbers_of_autograd(name: str, target: str, some: bool, records: list[Record]) -> None:
    turn = [*ACTORS].index(name) + [*TARGETS, *PARAMETERS].index(target)
    for batch in (SHAPES[turn % 3],) if some else SHAPES:
        *ours, usual = _each(name, Saliency(target={**TARGETS, **PARAMETERS}[target]), batch)
        for one in ours:
            if isinstance(usual, str):
                assert one == usual
                continue
            for key, value in usual.items(True, True):
                torch.testing.assert_close(one[key], value, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", ACTORS)
def test_several_methods_share_one_run(name: str, records: list[Record]) -> None:
    """Whatever each explains: what is found is what each finds alone, and the chain runs once."""
    torch.manual_seed(0)
    actor = ACTORS[name](nn.Tanh)
    data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double)}, batch_size=ROWS)
    with torch.no_grad():
        data = actor(data)
    alone: dict[str, Any] = {}
    for label, target in [*TARGETS.items(), *PARAMETERS.items()]:
        with Saliency(target=target).prepare(actor) as hooked:
            try:
                alone[label] = hooked.annotate(data)["attr"]
            except TdhookError:  # of another kind of actor's
                continue
    assert len(alone) > 3
    named = {**TARGETS, **PARAMETERS}
    for absolute in (False, True):
        methods = [
            Saliency(target=named[label], attribution_key=f"by {label}", absolute=absolute and index % 2 == 1)
            for index, label in enumerate(alone)
        ]
        records.clear()
        with Compose(*methods).prepare(actor) as hooked:
            found = hooked.annotate(data)
        assert len(records) == 1
        for index, (label, expected) in enumerate(alone.items()):
            for key, value in expected.items(True, True):
                value = value.abs() if absolute and index % 2 == 1 else value
                torch.testing.assert_close(found[f"by {label}"][key], value, atol=1e-12, rtol=1e-10)


def test_what_one_of_several_methods_asks_wrongly_is_said(records: list[Record]) -> None:
    actor = ACTORS["categorical"](nn.Tanh)
    data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double)}, batch_size=ROWS)
    with torch.no_grad():
        data = actor(data)
    wrong = Saliency(target=targets.logit(7), attribution_key="wrong")
    with wrong.prepare(actor) as hooked, pytest.raises(TargetError, match="3 entries") as alone:
        hooked.annotate(data)
    with Compose(Saliency(), wrong).prepare(actor) as hooked, pytest.raises(TargetError) as together:
        hooked.annotate(data)
    assert str(together.value) == str(alone.value)


@pytest.mark.parametrize("name", [name for name in ACTORS if "q" not in name])
def test_they_are_explained_by_their_chain(name: str, records: list[Record]) -> None:
    for form in ("annotate", "step"):
        records.clear()
        torch.manual_seed(0)
        actor = ACTORS[name](nn.Tanh)
        when = "batch" if form == "annotate" else "step"
        data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double)}, batch_size=ROWS)
        with Saliency(target=TARGETS["log-prob"], when=when).prepare(actor) as hooked, torch.no_grad():
            data = hooked(data)
            if form == "annotate":
                hooked.annotate(data)
        assert len(records) == 1


@pytest.mark.parametrize("name", ["categorical", "one-hot", "tanh normal", "normal", "q", "bernoulli"])
@pytest.mark.parametrize("target", ["default", "entropy"])
def test_paths_and_deltas(name: str, target: str, records: list[Record]) -> None:
    method = IntegratedGradients(target=TARGETS[target], baseline=0.0, n_steps=20, compute_convergence_delta=True)
    *ours, usual = _each(name, method)
    for one in ours:
        if isinstance(usual, str):
            assert one == usual
        else:
            torch.testing.assert_close(one["observation"], usual["observation"], atol=1e-12, rtol=1e-10)
            assert records


def _spoil_index(data: TensorDict) -> None:
    data["action"][2] = 5


def _spoil_negative(data: TensorDict) -> None:
    data["action"][2] = -1


def _spoil_observation(data: TensorDict) -> None:
    data["observation"][2] = torch.nan


def _spoil_shape(data: TensorDict) -> None:
    data["action"] = data["action"].unsqueeze(-1).expand(ROWS, 2).contiguous()


def _spoil_one_hot(data: TensorDict) -> None:
    data["action"][2] = data["action"].new_ones(3)


def _spoil_missing(data: TensorDict) -> None:
    del data["action"]


SPOILED = [
    *(("categorical", spoil) for spoil in (_spoil_index, _spoil_negative, _spoil_observation, _spoil_shape)),
    *(("one-hot of torch", spoil) for spoil in (_spoil_one_hot, _spoil_observation)),
    ("one-hot", _spoil_one_hot),
    ("tanh normal", _spoil_observation),
    ("categorical", _spoil_missing),
    ("q", _spoil_observation),
    ("q", _spoil_missing),
]


@pytest.mark.parametrize("target", [None, targets.chosen_logit(), targets.logit(1), targets.logit(1, "loc")])
@pytest.mark.parametrize(("name", "spoil"), SPOILED, ids=lambda one: getattr(one, "__name__", one))
def test_what_does_not_fit_is_said_as_ever(name: str, spoil: Any, target: Any) -> None:
    found: list[Any] = []
    for kind, is_known in VARIANTS:
        torch.manual_seed(0)
        actor = ACTORS[name](kind)
        torch.manual_seed(1)
        data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double)}, batch_size=ROWS)
        with torch.no_grad():
            data = actor(data)
        spoil(data)
        with Saliency(target=target).prepare(actor) as hooked:
            if not is_known:
                hooked._hooked.decider = None
            try:
                found.append(hooked.annotate(data, on_mismatch="ignore"))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    *ours, usual = found
    for one in ours:
        if isinstance(usual, str):
            assert one == usual
            continue
        torch.testing.assert_close(one["attr", "observation"], usual["attr", "observation"], equal_nan=True)
        assert torch.equal(one["computed", "attr"], usual["computed", "attr"])


def test_changes_of_the_actor_are_seen() -> None:
    """Hooks on any of its modules, a mask, a layer replaced, weights changed in place past autograd."""
    torch.manual_seed(0)
    actor = ACTORS["categorical"](nn.Tanh)
    data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double)}, batch_size=ROWS)
    with Saliency().prepare(actor) as hooked:
        with torch.no_grad():
            data = hooked(data)
        first = hooked.annotate(data)
        assert hooked.annotate(first)["attr", "observation"] is first["attr", "observation"]

        def again() -> Tensor:
            return hooked.annotate(data, on_mismatch="ignore")["attr", "observation"]

        places = {
            "the module": lambda: hooked.module[0].register_forward_hook(lambda _, args, out: _doubled(out)),
            "a layer": lambda: hooked.module[0].module[2].register_forward_hook(lambda _, args, out: 2 * out),
            "the draw": lambda: hooked.module[1].register_forward_pre_hook(lambda _, args: (_doubled(args[0]),)),
        }
        for place, hook in places.items():
            handle = hook()
            assert not torch.allclose(again(), first["attr", "observation"]), place
            handle.remove()
        assert torch.equal(again(), first["attr", "observation"])
        actor.module[0].module[0].weight.data.mul_(2)  # which no version counts
        assert not torch.allclose(
            hooked.annotate(first, on_mismatch="ignore")["attr", "observation"], first["attr", "observation"]
        )


def _doubled(data: TensorDict) -> TensorDict:
    return data.set("logits", 2 * data["logits"])


def test_masked_choices_are_left_to_autograd() -> None:
    net = _net(nn.Tanh, 3)
    module = Module(net, ["observation"], ["logits"])
    actor = ProbabilisticActor(module, {"logits": "logits", "mask": "mask"}, distribution_class=MaskedCategorical)
    mask = torch.tensor([True, True, False]).expand(ROWS, 3)
    data = TensorDict({"observation": torch.randn(ROWS, 6, dtype=torch.double), "mask": mask}, batch_size=ROWS)
    with Saliency(inputs=["observation"]).prepare(actor) as hooked:
        with torch.no_grad():
            data = hooked(data)
        found = hooked.annotate(data)["attr", "observation"]
    x = data["observation"].clone().requires_grad_()
    taken = net(x)[:, :2].log_softmax(-1).gather(-1, data["action"].unsqueeze(-1))
    torch.testing.assert_close(found, torch.autograd.grad(taken.sum(), x)[0])
