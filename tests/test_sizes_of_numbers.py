"""Numbers of every size: what is found does not depend on it, or is refused by name with what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import metrics, statistics
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdhook_rl.latent.probing import ClassStatistics, LinearEstimator, MeanDifferenceClassifier, TargetStatistics
from tdhook_rl.latent.probing.value_bank import ValueBank
from tdhook_rl.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator
from tdhook_rl.rollout import OnlineProbe, ProbeSuite

generator = torch.Generator().manual_seed(0)
X = torch.randn(200, 4, generator=generator, dtype=torch.float64)
CLASS = (X[:, 0] + 0.3 * torch.randn(200, generator=generator) > 0).long()
NUMBER = 2 * X[:, :1] + X[:, 1:2] ** 2
EPISODE = torch.arange(200) // 10


def rows(x: Tensor, label: Tensor) -> TensorDict:
    return TensorDict({"x": x, "y": label, "collector": {"traj_ids": EPISODE}}, 200)


def online(kind: str, label: Tensor) -> Callable[[Tensor], Any]:
    def found(x: Tensor) -> list[float]:
        probe = OnlineProbe(features="x", label="y", kind=kind)  # type: ignore[arg-type]
        probe.update(rows(x, label))
        return [one.estimate for one in probe.scores.values()]

    return found


def suite(label: Tensor) -> Callable[[Tensor], Any]:
    def found(x: Tensor) -> float:
        layers = nn.Sequential(nn.Identity(), nn.Linear(4, 2, dtype=x.dtype))
        probes = ProbeSuite(
            TensorDictModule(layers, ["x"], ["action"]), sites=["module.0"], concepts={"a": "y"}, untrained=False
        )
        probes.update(rows(x, label))
        return float(probes.table()["module.0", "a"].trained)

    return found


def of_classes(x: Tensor) -> Any:
    sums = ClassStatistics(features=4, classes=2)
    sums.add(x, CLASS)
    return (sums.solve().scores(x).argmax(-1) == CLASS).double().mean()


def of_numbers(x: Tensor) -> Any:
    sums = TargetStatistics(features=4, targets=1)
    sums.add(x, NUMBER)
    return (sums.solve().predict(x.double()) - NUMBER).square().mean()


def of_target(x: Tensor) -> Any:
    """The share of a number that is explained, whatever its size."""
    target = x[:, :1] + x[:, 1:2]
    sums = TargetStatistics(features=4, targets=1)
    sums.add(X, target)
    size = target.double().abs().max()
    return ((sums.solve().predict(X) - target) / size).square().mean()


def estimated(estimator: Any) -> Callable[[Tensor], Any]:
    return lambda x: (estimator().fit(x, y=CLASS).predict(x) == CLASS).double().mean()


def regression(x: Tensor) -> Any:
    target = x[:, 0] + x[:, 1]
    return LinearEstimator(epochs=3, seed=0).fit(X.to(x.dtype), y=target).predict(X.to(x.dtype)) / target.abs().max()


def cloud(estimator: Any) -> Callable[[Tensor], Any]:
    return lambda x: estimator(TensorDict({"data": x}))["dimension"].double().mean()


def pair(estimator: Any) -> Callable[[Tensor], Any]:
    names = [*estimator.out_keys]
    return lambda x: [float(estimator(TensorDict({"data_a": x, "data_b": x + 0.5 * x.flip(-1)}))[one]) for one in names]


def interval(function: Any, power: int = 1) -> Callable[[Tensor], Any]:
    """Limits in units of the values."""

    def found(x: Tensor) -> list[float]:
        one = function(x[:, 0].double())
        unit = float(x.double().abs().max()) ** power
        return [value / unit for value in (one.estimate, one.low, one.high)]

    return found


ASKED: dict[str, Callable[[Tensor], Any]] = {
    "online lda": online("lda", CLASS),
    "online ridge": online("ridge", CLASS),
    "online labels": online("lda", torch.stack([CLASS, 1 - CLASS], -1)),
    "online numbers": online("ridge", NUMBER),
    "suite of classes": suite(CLASS),
    "suite of numbers": suite(NUMBER[:, 0]),
    "class statistics": of_classes,
    "target statistics": of_numbers,
    "large targets": of_target,
    "linear estimator": estimated(lambda: LinearEstimator(num_classes=2, epochs=3, seed=0)),
    "difference of means": estimated(MeanDifferenceClassifier),
    "large values": regression,
    "two-nn": cloud(TwoNnDimensionEstimator()),
    "local knn": cloud(LocalKnnDimensionEstimator()),
    "local pca": cloud(LocalPcaDimensionEstimator()),
    "ca-pca": cloud(CaPcaDimensionEstimator()),
    "cka": pair(CkaEstimator()),
    "cka without bias": pair(CkaEstimator(debiased=True)),
    "cka, rbf": pair(CkaEstimator(kernel="rbf")),
    "information imbalance": pair(InformationImbalanceEstimator()),
    "unit scores": metrics.unit_scores,
    "effective rank": metrics.effective_rank,
    "entropy rank": metrics.entropy_rank,
    "stable rank": metrics.stable_rank,
    "mean": interval(lambda x: statistics.grouped_mean(x, EPISODE)),
    "iqm": interval(lambda x: statistics.iqm(x, EPISODE, resamples=200)),
    "bootstrap": interval(lambda x: statistics.bootstrap(np.median, x, EPISODE, resamples=200)),
    "paired difference": interval(lambda x: statistics.paired_difference(x, -x, EPISODE)),
    "unpaired difference": interval(lambda x: statistics.unpaired_difference(x[:100], x[100:])),
    "ratio of means": interval(lambda x: statistics.ratio_of_means(x.abs(), x.abs() / 2, EPISODE), 0),
    "probability of improvement": interval(lambda x: statistics.probability_of_improvement(x[:100], x[100:]), 0),
}
POWERS = [
    (torch.float32, -90),
    (torch.float32, 90),
    *((torch.float64, one) for one in (-110, 115, 400, 500, 700, 1021)),
]


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_the_same_at_every_size_or_refused(name: str) -> None:
    of, answers = ASKED[name], 0
    for dtype, power in POWERS:
        right, sized = of(X.to(dtype)), (X.to(dtype).double() * 2.0**power).to(dtype)
        refused = ""
        try:
            found = of(sized)
        except InputError as error:
            refused = str(error)
        if refused:
            assert power > 120
            assert "divide them" in refused
            continue
        answers += 1
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(right), rtol=1e-4, atol=1e-6)
    assert answers >= 4


@pytest.mark.filterwarnings("ignore:some features vary by less than")
@pytest.mark.parametrize("name", [name for name in ASKED if "online" in name or "suite" in name])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37])
def test_a_unit_that_hardly_varies_takes_nothing_from_the_others(name: str, size: float) -> None:
    """As the output of a sigmoid or an exponential that is all but off: its weight would be infinite."""
    x = X.clone()
    x[:, 3] = X[:, 3].abs() * size
    torch.testing.assert_close(
        torch.as_tensor(ASKED[name](x.float())), torch.as_tensor(ASKED[name](x.where(x.abs() > 1e-30, 0).float()))
    )


PROBES = [one for one in ASKED if one.startswith(("online", "suite", "class stat", "target stat", "linear"))]


@pytest.mark.filterwarnings("always:some features vary by less than")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-122, -130, -140])
@pytest.mark.parametrize("name", PROBES)
def test_features_that_are_too_small_for_a_probe_are_said(
    name: str, power: int, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """Some of them, or all; where nothing is said they are read as at any size."""
    x = X.clone()
    for columns in ([0, 1], [2, 3]):
        x[:, columns] = X[:, columns] * 2.0**power
        found = ASKED[name](x.to(dtype))
        said = [str(one.message) for one in recwarn if "count as constant" in str(one.message)]
        if said:
            assert "vary by less than 1e-36" in said[0]
            assert "multiply these features" in said[0]
        else:
            assert name == "linear estimator"
            right = ASKED[name](X.to(dtype))
            torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(right), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PROBES)
def test_of_features_that_are_constant_nothing_is_said(name: str, recwarn: pytest.WarningsRecorder) -> None:
    for constant in (0.0, 1e-40, 1e-30, 0.1, 1e4):
        x = X.clone()
        x[:, 3] = constant
        ASKED[name](x.float())
        ASKED[name](x)
    assert not [str(one.message) for one in recwarn if "count as constant" in str(one.message)]


def test_a_batch_that_is_refused_leaves_a_probe_as_it_was() -> None:
    probe = OnlineProbe(features="x", label="y", decay=0.5)
    probe.update(rows(X, CLASS))
    before = probe.statistics.moment.clone(), probe.probe, dict(probe.scores)
    with pytest.raises(InputError, match=r"features 'x' reach .*e\+200"):
        probe.update(rows(X * 1e200, CLASS))
    assert torch.equal(probe.statistics.moment, before[0])
    assert (probe.probe, probe.scores) == before[1:]


def test_weights_that_are_too_large_are_refused() -> None:
    sums = TargetStatistics(features=4, targets=1)
    sums.add(X * 1e-20, NUMBER * 1e30)
    with pytest.raises(InputError, match=r"the weights of a probe are as large as .*scale them first"):
        sums.solve()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_that_is_read_without_an_error_has_no_penalty_for_it(dtype: torch.dtype, seed: int) -> None:
    """The error of each penalty, by hand from the rows of the other half; 0 but for rounding, which may be below it."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(300, 5, generator=draw) * 10 ** (seed % 4 - 1)).to(dtype)
    number = x.double() @ torch.randn(5, 1, generator=draw, dtype=torch.float64) + seed
    halves = torch.arange(300).chunk(2)
    bank = ValueBank(sources=1, features=5, numbers=1)
    bank.add([x], number, halves)
    error = float((bank.solve(bank.choose()).predict([x])[:, 0] - number).square().mean() / number.var())
    assert math.log10(float(bank.choose())) < -4
    assert error < 1e-10
