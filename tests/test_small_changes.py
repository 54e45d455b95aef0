"""What mutation testing found that no test had noticed: a small change of it would have gone by unseen."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torchrl.modules import ProbabilisticActor

from tdhook_rl import LRP, GuidedBackpropagation, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import GradCAM, Occlusion
from tdhook_rl.attribution.functions import Kind, operation
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.latent.probing import ClassStatistics, TargetStatistics
from tdhook_rl.latent.probing.held_out import ScoreHistograms
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tests.policies import FEATURES

# ------------------------------------------------------------------ histograms of scores


def _rows(count: int, sources: int, labels: int) -> tuple[Tensor, Tensor]:
    yes = torch.rand(count, labels) < 0.5
    return torch.randn(count, sources, labels).double() + yes[:, None].double(), yes


def _added(into: ScoreHistograms, scores: Tensor, yes: Tensor, usable: Tensor | None = None) -> None:
    zeros = torch.zeros(scores.shape[1:], dtype=torch.float64)
    into.add([torch.arange(len(scores)) % 20], scores, yes, zeros, zeros + 1, usable)


def test_areas_after_a_decay_are_those_of_weighted_rows() -> None:
    (old, was), (new, now) = _rows(400, 1, 2), _rows(300, 1, 2)
    new[:, 0, 0] *= -1  # what is new says the contrary
    found = ScoreHistograms(labels=2, groupings=1)
    _added(found, old, was)
    found.decay(0.2)
    _added(found, new, now)
    weight = torch.cat([torch.full((400,), 0.2), torch.ones(300)])
    for label in range(2):
        scores, yes = torch.cat([old, new])[:, 0, label], torch.cat([was, now])[:, label]
        expected = roc_auc_score(yes, scores, sample_weight=weight)
        assert found.area(label, 0.95).estimate == pytest.approx(expected, abs=0.01)


def test_areas_without_a_label_are_those_of_the_others() -> None:
    scores, yes = _rows(300, 2, 3)
    scores[:, 1] *= 3
    found = ScoreHistograms(labels=3, groupings=1, sources=2)
    _added(found, scores, yes)
    for gone in range(3):
        fewer = found.without(gone)
        for source in range(2):
            left = [found.area(label, 0.95, source).estimate for label in range(3) if label != gone]
            assert [fewer.area(label, 0.95, source).estimate for label in range(2)] == left


def test_areas_are_of_the_rows_that_a_source_has() -> None:
    scores, yes = _rows(300, 2, 2)
    usable = torch.rand(300, 2) < 0.5
    found = ScoreHistograms(labels=2, groupings=1, sources=2)
    _added(found, scores, yes, usable[..., None].expand(300, 2, 2))
    for source in range(2):
        alone = ScoreHistograms(labels=2, groupings=1)
        _added(alone, scores[usable[:, source], source : source + 1], yes[usable[:, source]])
        for label in range(2):
            assert found.area(label, 0.95, source).estimate == pytest.approx(alone.area(label, 0.95).estimate, abs=1e-9)


# ------------------------------------------------------------------ sums of probes


def _batch(labels: Tensor, first: int, features: Tensor | None = None) -> TensorDict:
    rows = len(labels)
    values = torch.randn(rows, 4) if features is None else features
    return TensorDict({"f": values, "y": labels, "episode": first + torch.arange(rows) // 2}, [rows])


def test_what_was_before_a_decay_of_zero_counts_for_nothing() -> None:
    first, second = (_batch(torch.rand(200, 3) < 0.5, start) for start in (0, 1000))
    second["f"][:, :3] += 2 * second["y"].float()
    options = {"features": "f", "label": "y", "split": GroupSplit("episode")}
    both, alone = OnlineProbe(**options, decay=0.0), OnlineProbe(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.update(first)
        found, expected = both.update(second), alone.update(second)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert expected["accuracy"] > 0.75


def test_every_sum_of_classes_decays() -> None:
    features, labels = torch.randn(30, 3).double(), torch.randint(2, (30,))
    one = ClassStatistics(features=3, classes=2)
    one.add(features, labels)
    before = {name: getattr(one, name).clone() for name in ("count", "total", "moment")}
    one.decay(0.25)
    for name, value in before.items():
        torch.testing.assert_close(getattr(one, name), 0.25 * value)


def test_a_feature_that_never_changes_is_no_part_of_a_discriminant() -> None:
    features, labels = torch.randn(200, 3).double(), torch.rand(200, 2) < 0.5
    features[:, :2] += labels.double()
    features[:, 2] = 7.0
    whole, fewer = (TargetStatistics(features=width, targets=2, labels=True) for width in (3, 2))
    whole.add(features, labels)
    fewer.add(features[:, :2], labels)
    found, expected = (one.solve(kind="lda", path="1") for one in (whole, fewer))
    assert bool((found.weight[:, 2] == 0).all())
    torch.testing.assert_close(found.weight[:, :2], expected.weight)
    torch.testing.assert_close(found.bias, expected.bias)


def test_sums_of_no_features() -> None:
    with pytest.raises(InputError, match="at least 1 feature, got 0"):
        TargetStatistics(features=0, targets=1)


def test_an_area_is_not_known_where_one_class_has_too_few_rows() -> None:
    labels = (torch.arange(400) % 50 == 0).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = OnlineProbe(features="f", label="y", split=GroupSplit("episode"), min_rows=50)
        found = one.update(_batch(labels, 0))
    assert math.isnan(found["auc"])
    assert one.scores["auc"].words == "too few rows of a class"


# ------------------------------------------------------------------ what LRP and the like know of functions

X, INDEX = torch.randn(4, 3), (torch.tensor([0, 1]),)
OPERATIONS = {
    "batch_norm in eval mode": (F.batch_norm, (X, X[0], X[0].abs(), None, None, False), {}, Kind.MULTILINEAR),
    "batch_norm in training": (F.batch_norm, (X, X[0], X[0].abs(), None, None, True), {}, Kind.OTHER),
    "batch_norm in training by name": (F.batch_norm, (X, X[0], X[0].abs()), {"training": True}, Kind.OTHER),
    "index_put": (torch.index_put, (X, INDEX, X[:2]), {}, Kind.MOVES),
    "index_put that adds": (torch.index_put, (X, INDEX, X[:2]), {"accumulate": True}, Kind.OTHER),
    "index_put that adds by position": (torch.index_put, (X, INDEX, X[:2], True), {}, Kind.OTHER),
    "another function with that argument": (torch.exp, (X,), {"accumulate": True}, Kind.ELEMENTWISE),
    "another function that trains": (torch.add, (X, X), {"training": True}, Kind.LINEAR),
    "lerp": (torch.lerp, (X, X, 0.5), {}, Kind.LINEAR),
    "lerp by a tensor": (torch.lerp, (X, X, torch.ones(4, 3)), {}, Kind.LINEAR),
    "lerp by what is learnt": (torch.lerp, (X, X, torch.ones(4, 3, requires_grad=True)), {}, Kind.OTHER),
    "lerp by what is learnt, by name": (torch.lerp, (X, X), {"weight": torch.ones(1, requires_grad=True)}, Kind.OTHER),
    "the larger of two": (torch.max, (X, X), {}, Kind.CHOOSES),
    "the larger over a dimension": (torch.max, (X, 1), {}, Kind.MOVES),
    "scatter": (torch.scatter, (X, 0, torch.zeros(1, 3, dtype=torch.long), X[:1]), {}, Kind.MOVES),
    "scatter that adds": (
        torch.scatter, (X, 0, torch.zeros(1, 3, dtype=torch.long), X[:1]), {"reduce": "add"}, Kind.OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_function_does(name: str) -> None:
    function, arguments, options, kind = OPERATIONS[name]
    assert operation(function, arguments, options).kind is kind


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "pow"])
def test_operators_in_place_are_those_out_of_place(name: str) -> None:
    value = torch.ones(3)
    arguments = (value, 2.0)
    found = operation(getattr(torch.Tensor, f"__i{name}__"), arguments, {})
    plain = operation(getattr(torch.Tensor, f"__{name}__"), arguments, {})
    assert found.in_place
    assert not plain.in_place
    assert found.kind is plain.kind
    assert found.kind is not Kind.OTHER
    target, given, _ = found.out_of_place(arguments, {})
    assert target is value
    assert torch.equal(found.base(*given), getattr(torch.ones(3), f"__{name}__")(2.0))


# ------------------------------------------------------------------ when, and of what
@pytest.mark.parametrize(
    "method",
    [Saliency(), IntegratedGradients(baseline=0.0), LRP(), Occlusion(baseline=0.0), GuidedBackpropagation()],
    ids=lambda method: type(method).__name__,
)
def test_policies_are_explained_once_a_batch_and_networks_in_every_call(method: Any) -> None:
    """Unless it is said when: of a policy, each step would cost a second pass."""
    data = TensorDict({"observation": torch.randn(5, FEATURES)}, batch_size=5)
    net = TensorDictModule(nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 2)), ["observation"], ["out"])
    logits = TensorDictModule(net.module, ["observation"], ["logits"])
    actor = ProbabilisticActor(logits, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    for policy, when, steps in ((actor, None, False), (net, None, True), (actor, "step", True), (net, "batch", False)):
        with replace(method, when=when).prepare(policy) as hooked:
            called = hooked(data.clone())
            assert (("attr", "observation") in called.keys(True, True)) == steps
            assert ("attr", "observation") in hooked.annotate(called).keys(True, True)


@pytest.mark.parametrize(
    "method", [Saliency, partial(IntegratedGradients, baseline=0.0), LRP, GuidedBackpropagation], ids=str
)
def test_what_depends_on_nothing_is_no_target(method: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    constant = targets.Target("constant", lambda run: run.outputs["output"].detach().sum(-1))
    with method(target=constant).prepare(net) as hooked, pytest.raises(TargetError, match="constant"):
        hooked(TensorDict({"input": torch.randn(5, 3)}, batch_size=5))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("modules", [[], {}, ["0"], None])
def test_maps_of_no_modules(modules: object) -> None:
    with pytest.raises(InputError, match="modules_to_attribute"):
        GradCAM(modules_to_attribute=modules)


def test_a_baseline_that_no_float_holds() -> None:
    assert IntegratedGradients(baseline=2.0**62).baseline == 2.0**62
    with pytest.raises(InputError, match="baseline= is a finite number"):
        IntegratedGradients(baseline=2**64)


def test_a_trajectory_is_not_explained_step_by_step() -> None:
    with pytest.raises(InputError, match="which no step knows"):
        Saliency(horizon="trajectory", when="step")
