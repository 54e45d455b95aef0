"""A stored action that the policy cannot have drawn is refused: a number out of bounds, no bit, no index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, InteractionType, TensorDictModule
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal, TruncatedNormal

from tdhook_rl import LRP, IntegratedGradients, Saliency
from tdhook_rl.adapters.distributions import Bits, MultiCategorical, SquashedNormal
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import TargetError

ROWS = 4
BOUNDS = {"low": torch.tensor([-2.0, 0.5]).double(), "high": torch.tensor([2.0, 3.0]).double()}


class Split(nn.Module):
    """Two positive parameters, of one row of numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2 * width)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.net(x).exp().chunk(2, -1))


class Share(D.Independent):
    """Numbers between 0 and 1, of a class of one's own."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(D.Beta(loc, scale), 1)


class Range(D.Independent):
    """Bounds that are the parameters."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(D.Uniform(-loc, scale), 1)


def numbers(kind: Any, **given: Any) -> ProbabilisticActor:
    net = TensorDictModule(Split(2), ["observation"], ["loc", "scale"])
    drawn = {"distribution_class": kind, "distribution_kwargs": given or None}
    return ProbabilisticActor(net, in_keys=["loc", "scale"], default_interaction_type=InteractionType.RANDOM, **drawn)


def choices(kind: Any, width: int, **given: Any) -> ProbabilisticActor:
    layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, width)).double()
    net = TensorDictModule(layers, ["observation"], ["logits"])
    drawn = {"distribution_class": kind, "distribution_kwargs": given or None}
    return ProbabilisticActor(net, in_keys=["logits"], default_interaction_type=InteractionType.RANDOM, **drawn)


def composite() -> ProbabilisticActor:
    net = TensorDictModule(Split(2), ["observation"], [("params", "action", "loc"), ("params", "action", "scale")])
    given = {"distribution_map": {"action": TanhNormal}}
    return ProbabilisticActor(
        net,
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs=given,
        default_interaction_type=InteractionType.RANDOM,
    )


#: Policies, what they cannot have drawn in the last entry of a row, and what is said of it.
KINDS: dict[str, tuple[Any, list[float], str]] = {
    "tanh": (lambda: numbers(TanhNormal), [1.7, -1.01], r"between -1 and 1"),
    "tanh, bounds": (lambda: numbers(TanhNormal, low=-2.0, high=2.0), [2.1], r"between -2 and 2"),
    "tanh, bounds of each": (lambda: numbers(TanhNormal, **BOUNDS), [0.4, 3.1], r"between 0.5 and 3"),
    "truncated": (lambda: numbers(TruncatedNormal, **BOUNDS), [0.4, 3.1], r"between 0.5 and 3"),
    "squashed": (lambda: numbers(SquashedNormal), [1.7, -1.01], r"between -1 and 1"),
    "share": (lambda: numbers(Share), [1.2, -0.1], r"between 0 and 1"),
    "uniform": (lambda: numbers(Range), [-99.0, 99.0], r"between -\d"),
    "bits": (lambda: choices(Bits, 3), [2.0, -1.0, 0.3], "0 or 1"),
    "bits of torch": (lambda: choices(D.Bernoulli, 3), [2.0, 0.3], "0 or 1"),
    "several choices": (lambda: choices(MultiCategorical, 5, sizes=(2, 3)), [3, -1], r"whole numbers between 0 and 2"),
    "one-hot": (lambda: choices(OneHotCategorical, 3), [], "several"),
    "composite": (composite, [1.7], r"between -1 and 1"),
}
#: What all methods are tried on; relevance is of a logit unless told otherwise, for which no number is read.
WITH_ALL = ("tanh", "squashed")
METHODS = {
    "saliency": lambda: Saliency(),
    "integrated": lambda: IntegratedGradients(baseline=0.0, n_steps=3),
    "occlusion": lambda: Occlusion(),
    "relevance": lambda: LRP(),
}


def rows(policy: Any) -> TensorDict:
    data = TensorDict({"observation": torch.randn(ROWS, 5, dtype=torch.float64)}, batch_size=ROWS)
    return policy(data).detach()


def with_last(data: TensorDict, value: float, row: int = 1) -> TensorDict:
    action = data["action"].clone()
    action[row, -1] = value
    return data.copy().set("action", action)


def wrongs(kind: str, data: TensorDict) -> list[TensorDict]:
    if kind == "one-hot":
        return [data.copy().set("action", torch.ones_like(data["action"]))]
    return [with_last(data, value) for value in KINDS[kind][1]]


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in KINDS for method in METHODS if method == "saliency" or kind in WITH_ALL],
)
def test_it_is_refused(kind: str, method: str) -> None:
    torch.manual_seed(0)
    policy = KINDS[kind][0]()
    data = rows(policy)
    with METHODS[method]().prepare(policy) as hooked:
        expected = hooked.annotate(data.clone())["attr", "observation"]
        assert expected.isfinite().all()
        for wrong in wrongs(kind, data):
            with pytest.raises(TargetError, match=f"stored .*action.*{KINDS[kind][2]}"):
                hooked.annotate(wrong.clone(), on_mismatch="ignore")
        padded = data.clone()
        padded[1] = torch.zeros_like(data[1])  # which may be out of bounds
        padded["collector", "mask"] = real = torch.arange(ROWS) != 1
        found = hooked.annotate(padded)
    torch.testing.assert_close(found["attr", "observation"][real], expected[real])


@pytest.mark.parametrize("kind", ["tanh", "tanh, bounds", "tanh, bounds of each", "squashed"])
def test_bounds_and_what_they_are_rounded_to_can_be_drawn_and_what_is_no_number_is_not_computed(kind: str) -> None:
    policy = KINDS[kind][0]()
    data = rows(policy)
    low, high = {"tanh, bounds": (-2.0, 2.0), "tanh, bounds of each": (0.5, 3.0)}.get(kind, (-1.0, 1.0))
    with Saliency().prepare(policy) as hooked:
        for value in (low, high, low - 1e-6, high + 1e-6):
            assert hooked.annotate(with_last(data, value), on_mismatch="ignore")["computed", "attr"].all()
        found = hooked.annotate(with_last(data, float("nan")), on_mismatch="ignore")
    assert found["computed", "attr"].tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
@pytest.mark.parametrize("kind", ["bits", "bits of torch", "several choices", "one-hot"])
def test_choices_are_stored_in_any_dtype(kind: str, dtype: torch.dtype) -> None:
    if kind == "several choices" and dtype is torch.bool:
        pytest.skip("three choices are no bits")
    policy = KINDS[kind][0]()
    data = rows(policy)
    with Saliency().prepare(policy) as hooked:
        expected = hooked.annotate(data.clone())
        found = hooked.annotate(data.copy().set("action", data["action"].to(dtype)))
    assert torch.equal(found["attr", "observation"], expected["attr", "observation"])
    assert found["attr", "observation"].any()
