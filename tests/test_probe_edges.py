"""Where probes begin and end: the row that makes a class count, what stands twice, labels of one side only."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing import Probing, TargetStatistics
from tdhook_rl.latent.probing.bank import ClassBank
from tdhook_rl.latent.probing.held_out import Tally
from tdhook_rl.latent.probing.rows import Parts, Rows
from tdhook_rl.latent.probing.scaling import Scale
from tdhook_rl.latent.probing.scored import ScoredClasses, ScoredValues
from tdhook_rl.latent.probing.value_bank import ValueBank
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tests.test_probe_banks import halves_of, parts_of, rows_of, scored

OPTIONS: dict[str, Any] = {"penalty": 1e-2, "confidence": 0.95, "min_rows": 10}


@pytest.mark.parametrize("kind", ["classes", "labels"])
@pytest.mark.parametrize("rows", [9, 10])
def test_a_class_is_scored_from_its_least_rows_on(kind: str, rows: int) -> None:
    """Exactly ``min_rows`` held-out rows are enough, and one fewer is not."""
    split = GroupSplit("episode")
    labels = torch.arange(400) % 2
    data = TensorDict({"f": torch.randn(400, 3), "episode": torch.arange(400)}, [400])
    _, held = split(data)
    few = (held & (labels == 1)).nonzero()[:, 0]
    kept = torch.ones(400, dtype=torch.bool)
    kept[few[rows:]] = False
    data["y"] = labels if kind == "classes" else torch.stack([labels, torch.arange(400) // 2 % 2], 1).bool()
    probe = OnlineProbe(features="f", label="y", split=split, min_rows=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = probe.update(data[kept])
    name = "accuracy" if kind == "classes" else "accuracy.0"
    assert math.isnan(found[name]) == (rows < 10)


def test_a_class_that_comes_late_is_not_scored_by_what_was_before() -> None:
    one = ScoredClasses(sources=1, features=3, classes=[3], groupings=1, areas=0, **OPTIONS)
    for lacking in (True, False):
        labels = torch.arange(300)[:, None] % 3
        held = torch.arange(300) // 3 % 4 == 0
        train = ~held & (labels[:, 0] != 2) if lacking else ~held
        x = 4 * torch.eye(3)[labels[:, 0]]
        rows = Rows([x], labels, Parts([torch.arange(300) // 3 + 1000 * lacking], train, held))
        one.learn(rows)
        one.fit()
        one.judge(rows)
        assert one.score(0, 0).estimate == pytest.approx(2 / 3 if lacking else 1.0)
    # Of the class that was new only the rows since then count, of the others all.
    assert one.score(0, 0).rows == 25 + 2 * 50


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_there_is_no_probe_before_there_are_rows(kind: str) -> None:
    one, rows = scored(kind, 6, 1e-2), parts_of(kind, 1, 400, 6)
    assert one.probe(0, 0, "1", {}) is None
    one.judge(rows)  # scores nothing
    one.learn(rows)
    one.fit()
    assert one.probe(0, 0, "1", {}) is not None
    two = (
        ScoredClasses(sources=2, features=6, classes=[2, 3], groupings=1, areas=1, **OPTIONS)
        if kind == "classes"
        else ScoredValues(sources=2, features=6, numbers=2, groupings=1, **OPTIONS)
    )
    usable = torch.stack([torch.ones(400), torch.zeros(400)]).bool()
    both = Rows([rows.features[0], rows.features[0].clone()], rows.labels, rows.parts, usable)
    two.learn(both)
    two.fit()
    two.judge(both)
    assert two.probe(0, 0, "1", {}) is not None
    assert two.probe(1, 0, "1", {}) is None
    assert two.words(0, 0) == ""
    assert "no probe yet" in two.words(1, 0)


def test_a_guess_is_right_once_in_as_many_classes_as_are_scored() -> None:
    one, rows = scored("classes", 6, 1e-2), parts_of("classes", 1, 400, 6)
    assert isinstance(one, ScoredClasses)
    assert math.isnan(one.chance(0, 0))
    assert math.isnan(one.majority(0, 0))
    one.learn(rows)
    one.fit()
    one.judge(rows)
    assert (one.chance(0, 0), one.chance(0, 1)) == (1 / 2, 1 / 3)
    counts = rows.labels[rows.parts.judged, 1].bincount()
    assert one.majority(0, 1) == pytest.approx(float(counts.max() / counts.sum()))


def test_numbers_without_a_held_out_row_say_so() -> None:
    data = TensorDict({"f": torch.randn(50, 3), "y": torch.randn(50), "episode": torch.arange(50)}, [50])
    train, _ = GroupSplit("episode")(data)
    probe = OnlineProbe(features="f", label="y", kind="ridge", split=GroupSplit("episode"))
    with pytest.warns(UserWarning, match="no held-out row yet"):
        probe.update(data[train])


@pytest.mark.parametrize("shape", [(40,), (20, 2, 3), (2, 20), (20, 1, 1)])
def test_labels_of_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    data = TensorDict({"f": torch.randn(20, 3), "episode": torch.arange(20)}, [20])
    probe = OnlineProbe(features="f", label=lambda _: torch.zeros(shape).long(), split=GroupSplit("episode"))
    with pytest.raises(InputError, match="label"):
        probe.update(data)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_features_that_stand_twice_change_no_probe_of_a_bank(kind: str) -> None:
    """Where nothing is added to a covariance that has no inverse."""
    x, labels = rows_of(6, 500, 4, [2, 3])
    zero, found = torch.zeros(1, 2).double(), []
    for features in (x, torch.cat([x, x[:, :2]], 1)):
        width = features.shape[1]
        bank: Any = ClassBank(sources=1, features=width, classes=[2, 3])
        wanted: Any = labels
        if kind == "values":
            bank, wanted = ValueBank(sources=1, features=width, numbers=2), labels + 0.5 * x[:, :2].double()
        bank.add([features], wanted, halves_of(torch.arange(500) % 2))
        probes = bank.solve(zero)
        found.append(probes.scores([features]) if kind == "classes" else probes.predict([features]))
        assert bank.choose().shape == (1, 2)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_a_label_of_one_side_only_is_always_that_side() -> None:
    x = torch.randn(100, 3)
    labels = torch.stack([torch.ones(100), torch.zeros(100), x[:, 0] > 0.5], 1).bool()
    sums = TargetStatistics(features=3, targets=3, labels=True)
    sums.add(x, labels)
    probe = sums.solve(kind="lda")
    assert probe.predict(5 * x).bool().all(0).tolist() == [True, False, False]
    assert not probe.predict(5 * x).bool()[:, 1].any()
    assert bool((probe.weight[:2] == 0).all())
    # As many rows have a label is how likely it is, unless it is said otherwise.
    assert torch.equal(probe.bias, sums.solve(kind="lda", priors="rows").bias)
    assert not torch.equal(probe.bias, sums.solve(kind="lda", priors="equal").bias)


@pytest.mark.parametrize("other", [{"features": 4}, {"targets": 2}, {"labels": True}])
def test_sums_of_other_things_do_not_add(other: dict[str, Any]) -> None:
    given: dict[str, Any] = {"features": 3, "targets": 1, "labels": False}
    one, two = TargetStatistics(**given), TargetStatistics(**{**given, **other})
    with pytest.raises(InputError, match="statistics of"):
        one + two


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_numbers_far_from_zero_are_summed_about_the_mean_of_the_first(offset: float) -> None:
    x = torch.randn(300, 3)
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) + 0.01 * torch.randn(300))[:, None].double() + offset
    sums = TargetStatistics(features=3, targets=1)
    for part in range(0, 300, 100):
        sums.add(x[part : part + 100], y[part : part + 100])
    assert float(sums.target_shift) == pytest.approx(float(y[:100].mean()))
    design = torch.cat([x.double(), torch.ones(300, 1).double()], 1)
    expected = torch.linalg.lstsq(design, y).solution[:3, 0]
    torch.testing.assert_close(sums.solve(penalty=0.0).weight[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_groups_of_which_nothing_is_left_are_forgotten_and_the_others_kept() -> None:
    tally = Tally(width=2)
    tally.add(torch.tensor([3, 7, 3]), torch.tensor([[1.0, 2.0], [5.0, 6.0], [1.0, 1.0]]).double())
    for _ in range(200):
        tally.decay(0.5)
        tally.add(torch.tensor([9, 4]), torch.tensor([[1.0, 0.0], [2.0, 4.0]]).double())
    assert tally.codes.tolist() == [4, 9]
    torch.testing.assert_close(tally.sums, torch.tensor([[4.0, 8.0], [2.0, 0.0]]).double())


@pytest.mark.parametrize("mean", [1e-3, 1.0, 1e6])
def test_a_feature_is_constant_where_it_only_rounds(mean: float) -> None:
    """By its size: what is rounding of a million is a difference of one."""
    rounding = torch.finfo(torch.float32).eps * mean
    values = mean + torch.tensor([0.0, 1.0] * 50)[:, None] * torch.tensor([[0.0, 0.25, 100.0]]).double() * rounding
    scale = Scale.by(values.float(), centred=True)
    assert scale.spread.isinf().tolist() == [True, True, False]


def test_one_run_of_a_module_is_probed() -> None:
    seen = []

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.lin = nn.Tanh(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.lin(self.act(x)))

    class Keeps:
        def step(self, activation: torch.Tensor) -> None:
            seen.append(activation)

    x = torch.randn(5, 3)
    with Probing("act@1", lambda key, direction: Keeps()).prepare(Twice(), in_keys=["x"], out_keys=["y"]) as hooked:
        found = hooked(TensorDict({"x": x}, [5]))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], found["y"])
