"""What an online probe reports: pooled, by group, over the classes that are there, and in words where it cannot."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.latent.probing import ClassStatistics, TargetStatistics
from tdhook_rl.latent.probing.held_out import Tally
from tdhook_rl.rollout import GroupSplit, OnlineProbe

SPLIT = GroupSplit("episode")


def batch(features: Tensor, labels: Tensor, steps: int = 1, first: int = 0) -> TensorDict:
    rows = len(features)
    episode = first + torch.arange(rows) // steps
    return TensorDict({"f": features, "y": labels, "episode": episode}, [rows])


def probe(**options: object) -> OnlineProbe:
    return OnlineProbe(**{"features": "f", "label": "y", "split": SPLIT} | options)


def quietly(one: OnlineProbe, data: TensorDict) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return one.update(data)


# ------------------------------------------------------------------ which classes


@pytest.mark.parametrize("values", [[0, 1], [3], [1, 2, 3], [0, 4, 5, 7, 19, 22]])
@pytest.mark.parametrize("kind", ["lda", "ridge"])
def test_the_score_is_scikit_learns_over_the_classes_that_are_there(values: list[int], kind: str) -> None:
    labels = torch.tensor(values)[torch.randint(len(values), (3000,))]
    data = batch(torch.randn(3000, 8) + 2.0 * torch.eye(8)[labels % 8], labels, steps=5)
    one = probe(classes=25, kind=kind)
    if len(values) == 1:
        with pytest.warns(UserWarning, match=r"training rows hold no row of class 0, 1, 2, 4, 5, 6 and 18 more"):
            assert math.isnan(one.update(data)["accuracy"])
        return
    found = one.update(data)
    train, held = SPLIT(data)
    if kind == "lda":
        model = LinearDiscriminantAnalysis().fit(data["f"][train].numpy(), labels[train].numpy())
        expected = balanced_accuracy_score(labels[held], model.predict(data["f"][held].numpy()))
        assert found["accuracy"] == pytest.approx(expected, abs=0.02)
    own = balanced_accuracy_score(labels[held], one.probe.predict(data["f"][held]))
    assert found["accuracy"] == pytest.approx(own)
    assert found["classes"] == len(values)
    assert found["groups"] == data["episode"][held].unique().numel()
    assert found["rows"] == found["held_out_rows"] == int(held.sum())
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    absent = torch.ones(25, dtype=torch.bool).index_fill_(0, torch.tensor(values), False)
    assert (one.probe.probabilities(data["f"])[:, absent] < 1e-6).all()


def test_a_class_of_which_little_is_held_out_is_left_out_by_name() -> None:
    labels = torch.zeros(400, dtype=torch.long)
    train, held = SPLIT(batch(torch.zeros(400, 1), labels))
    labels[200:] = 1
    labels[held.nonzero()[:3, 0]] = 2
    labels[train.nonzero()[:30, 0]] = 2
    one = probe(classes=3)
    found = one.update(batch(torch.randn(400, 4), labels))
    assert found["classes"] == 2
    assert "left out, with fewer than min_rows=10 rows: class 2" in one.words
    every = probe(classes=3, min_rows=1)
    assert every.update(batch(torch.randn(400, 4), labels))["classes"] == 3


def test_a_class_that_was_never_trained_on_counts_as_wrong_until_it_is() -> None:
    labels = torch.arange(300) % 3
    data = batch(4 * torch.eye(3)[labels], labels)
    train, _ = SPLIT(data)
    lacking = data[~(train & (labels == 2))]
    one = probe(classes=3)
    with pytest.warns(UserWarning, match="held-out rows of class 2 count as wrong"):
        found = one.update(lacking)
    assert found["accuracy"] == pytest.approx(2 / 3)
    data["episode"] += 1000
    assert one.update(data)["accuracy"] == 1.0
    assert found["train_accuracy"] == 1.0


def test_a_score_that_cannot_be_had_says_why_once() -> None:
    ones, x = torch.ones(100, dtype=torch.long), torch.randn(100, 3)
    one = probe()
    with pytest.warns(UserWarning, match=r"accuracy of a probe of 'y': there is no probe yet: .* class 0"):
        one.update(batch(x, ones))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.update(batch(x, ones, first=100))
    train, _ = SPLIT(batch(x, ones))
    labels = ones.clone()
    labels[train.nonzero()[:30, 0]] = 0
    for data, message in (
        (batch(x, labels), "the held-out rows hold no row of class 0"),
        (batch(x, labels)[train], "no held-out row yet"),
    ):
        one = probe()
        with pytest.warns(UserWarning, match=message):
            found = one.update(data)
        assert math.isnan(found["accuracy"])
        assert math.isnan(found["auc"])
        assert one.probe is not None
    everything = probe(split=GroupSplit("episode", held_out=0.999999))
    with pytest.warns(UserWarning, match="there was no training row"):
        everything.update(batch(x, labels))


def test_the_fewest_rows_that_make_a_probe() -> None:
    """One row has no direction, two have; what is said of few held-out rows is not what is said of none."""
    for rows in (1, 2):
        numbers = probe(kind="ridge", split=GroupSplit("episode", held_out=1e-9))
        quietly(numbers, batch(torch.randn(rows, 3), torch.randn(rows)))
        assert (numbers.probe is not None) == (rows == 2)
    labels = torch.arange(400) % 2
    data = batch(torch.randn(400, 4), labels)
    train, held = SPLIT(data)
    each = [int((held & (labels == side)).nonzero()[0]) for side in (0, 1)]
    one = probe()
    with pytest.warns(UserWarning, match="class 0, class 1 fewer than min_rows=10|classes 0 and 1|fewer than min_rows"):
        one.update(torch.cat([data[train], data[each]]))
    assert one.probe is not None


@pytest.mark.parametrize("prevalence", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["lda", "ridge"])
def test_noise_is_at_chance(prevalence: float, kind: str) -> None:
    one = probe(kind=kind)
    for step in range(40):
        labels = (torch.rand(32, 1) < prevalence).long().expand(32, 16).reshape(-1)
        found = quietly(one, batch(torch.randn(512, 8), labels, steps=16, first=32 * step))
        score, area = found["accuracy"], found["auc"]
        assert math.isnan(score) or 0.25 < score < 0.75
    if prevalence == 0.5:
        assert 0.5 in one.scores["accuracy"] or abs(score - 0.5) < 0.05
        assert abs(area - 0.5) < 0.05


@pytest.mark.parametrize("prevalence", [0.02, 0.1, 0.5])
def test_a_rare_concept_is_found(prevalence: float) -> None:
    one, hits = probe(), []
    for step in range(60):
        labels = (torch.rand(32, 1) < prevalence).long().expand(32, 10).reshape(-1)
        features = torch.randn(320, 8)
        features[:, 0] += 2 * labels
        data = batch(features, labels, steps=10, first=32 * step)
        found = quietly(one, data)
        held = SPLIT(data)[1]
        if one.probe is not None:
            hits.append((labels[held], one.probe.predict(features[held]), one.probe.scores(features[held])))
    labels, guesses, scores = (torch.cat(part) for part in zip(*hits, strict=True))
    assert found["accuracy"] == pytest.approx(balanced_accuracy_score(labels, guesses), abs=0.01)
    assert found["accuracy"] > 0.78  # .84 at best
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]), abs=0.03)
    by_rows = probe(priors="rows")
    quietly(by_rows, data)
    if prevalence == 0.5:
        assert found["auc_low"] < 0.921 < found["auc_high"]


def test_old_batches_are_forgotten_with_the_decay() -> None:
    one = probe(decay=0.3)
    for step in range(12):
        labels = torch.randint(2, (200,))
        knows = step >= 6
        features = torch.randn(200, 3) + 6.0 * knows * labels[:, None]
        found = quietly(one, batch(features, labels, first=200 * step))
        if step == 5:
            assert found["accuracy"] < 0.65
    assert found["accuracy"] > 0.97
    assert found["rows"] < 90  # of 50 rows a batch, .3 is left of each before


# ------------------------------------------------------------------ other concepts


def test_numbers_are_scored_by_the_variance_explained() -> None:
    x = torch.randn(2000, 5) * 3 + 100
    y = 2 * x[:, 0] - x[:, 1] + 7 + torch.randn(2000)
    data = batch(x, y, steps=4)
    one = probe(kind="ridge", penalty=1.0)
    found = one.update(data)
    train, held = SPLIT(data)
    model = Ridge(alpha=1.0).fit(x[train].double().numpy(), y[train].double().numpy())
    expected = r2_score(y[held], model.predict(x[held].double().numpy()))
    assert found["r2"] == pytest.approx(expected, abs=1e-4)
    assert found["r2_low"] < found["r2"] < found["r2_high"] <= 1
    np.testing.assert_allclose(one.probe.weight[0], model.coef_, rtol=1e-4)
    assert "accuracy" not in found
    both = probe(kind="ridge")
    found = both.update(data.clone().set("y", torch.stack([y, torch.randn(2000)], 1)))
    assert found["r2"] == pytest.approx((found["r2.0"] + found["r2.1"]) / 2)
    assert found["r2_low"] < found["r2"] < found["r2_high"] <= 1
    assert abs(found["r2.1"]) < 0.05
    assert found["train_r2"] == pytest.approx(found["r2"], abs=0.05)
    with pytest.warns(UserWarning, match="all the same"):
        probe(kind="ridge").update(batch(x, torch.ones(2000)))
    with pytest.raises(InputError, match="numbers need kind='ridge'"):
        probe().update(data)
    gaps = y.clone()
    gaps[::3] = math.nan
    assert probe(kind="ridge").update(batch(x, gaps))["dropped_rows"] == 667


@pytest.mark.parametrize("kind", ["lda", "ridge"])
def test_several_labels_are_several_concepts(kind: str) -> None:
    x = torch.randn(3000, 6) * 10 - 500
    yes = torch.stack([x[:, 0] > -500, x[:, 1] > -487, torch.rand(3000) > 0.5, torch.zeros(3000) > 1], 1)
    one = probe(kind=kind)
    found = one.update(batch(x, yes, steps=3))
    assert found["accuracy.0"] > 0.95
    assert abs(found["accuracy.2"] - 0.5) < 0.08
    assert math.isnan(found["accuracy.3"])
    assert found["auc.1"] > 0.97
    assert found["accuracy"] == pytest.approx(np.mean([found[f"accuracy.{index}"] for index in range(3)]))
    assert found["classes"] == 3
    assert "label 3" in one.words
    for label in (0, 1):
        alone = probe(kind=kind)
        single = alone.update(batch(x, yes[:, label].long(), steps=3))
        assert single["accuracy"] == pytest.approx(found[f"accuracy.{label}"], abs=1e-6)
        assert single["auc"] == pytest.approx(found[f"auc.{label}"], abs=5e-3)
    assert one.probe.concept == "labels"
    assert one.probe.predict(x).shape == (3000, 4)
    with pytest.raises(InputError, match="0 or 1"):
        probe().update(batch(x, yes.long() + 1))


def test_a_label_is_any_function_of_the_batch() -> None:
    x = torch.randn(400, 4)
    data = batch(x, torch.zeros(400))

    def first_is_large(rows: TensorDict) -> Tensor:
        return rows["f"][:, 0] > 0

    one = OnlineProbe(features="f", label=first_is_large, split=SPLIT)
    assert one.update(data)["accuracy"] > 0.9
    wrong = OnlineProbe(features="f", label=lambda rows: 3, split=SPLIT)
    with pytest.raises(InputError, match="gives int, expected a tensor of the batch"):
        wrong.update(data)


# ------------------------------------------------------------------ rows and groups


def test_rows_that_are_padding_or_not_computed_count_for_nothing() -> None:
    x, labels = torch.randn(40, 10, 4), torch.randint(2, (40, 10))
    x[..., 0] += 2 * labels
    real = torch.rand(40, 10) > 0.3
    data = TensorDict({"f": x, "y": labels, "episode": torch.arange(40)[:, None].expand(40, 10)}, [40, 10])
    expected = probe().update(data[real])
    padded = data.clone()
    padded["f"][~real], padded["y"][~real] = 0.0, 99
    padded["collector", "mask"] = real
    found = probe().update(padded)
    assert found["dropped_rows"] == 0  # padding is no row
    assert found == pytest.approx(expected, nan_ok=True)


def test_modes_may_change_and_probes_travel() -> None:
    one = probe(decay=0.5)
    data = batch(torch.randn(200, 3), torch.randint(2, (200,)))
    with torch.inference_mode():
        one.update(batch(torch.randn(200, 3), torch.randint(2, (200,)), first=500))
    copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    found = one.update(data)
    assert all(other.update(data) == pytest.approx(found, nan_ok=True) for other in copies)


def test_an_error_leaves_the_sums_as_they_were() -> None:
    one = probe()
    data = batch(torch.randn(200, 3), torch.randint(2, (200,)))
    found = one.update(data)
    count = one.statistics.count.clone()
    for wrong in (data.clone().set("y", data["y"] + 1), data.exclude("episode"), data.exclude("f")):
        with pytest.raises((InputError, MissingKeyError)):
            one.update(wrong)
    for other in (batch(torch.randn(200, 4), data["y"]), batch(data["f"], torch.stack([data["y"]] * 2, 1))):
        with pytest.raises(InputError, match="before, and has"):
            one.update(other)
    assert torch.equal(one.statistics.count, count)
    assert one.scores["accuracy"].estimate == found["accuracy"]
    nothing = quietly(one, data[:0])
    assert nothing["accuracy"] == found["accuracy"]
    assert nothing["train_rows"] == 0


def test_the_interval_is_the_widest_of_all_groupings() -> None:
    rows = 3000
    level = torch.arange(rows) % 12
    x = torch.randn(12, 4)[level] + 0.5 * torch.randn(rows, 4)
    labels = (torch.randn(12) > 0).long()[level] ^ (torch.rand(rows) < 0.2).long()
    data = TensorDict({"f": x, "y": labels, "row": torch.arange(rows), "level": level}, [rows])
    widths = {}
    for keys in (("row",), ("row", "level")):
        split = GroupSplit(*keys, held_out=0.4)
        one = OnlineProbe(features="f", label="y", split=split)
        quietly(one, data)
        widths[keys] = one.scores["accuracy"]
    assert not widths["row", "level"].known or widths["row", "level"].half_width > 2 * widths["row",].half_width
    assert widths["row", "level"].groups < 12 < widths["row",].groups


def test_tallies_keep_sums_when_groups_are_many() -> None:
    few, many = Tally(width=2, groups=50), Tally(width=2)
    for start in range(0, 3000, 500):
        codes, values = torch.arange(start, start + 500) * 977 % 1013, torch.rand(500, 2)
        few.add(codes, values)
        many.add(codes, values)
    assert len(few.codes) <= 50 < len(many.codes) == 1013 or len(many.codes) > 900
    torch.testing.assert_close(few.sums.sum(0), many.sums.sum(0))
    many.decay(1e-9)
    assert not len(many.codes)


def test_arguments_that_mean_nothing() -> None:
    for options, message in (
        ({"kind": "LDA"}, "nearest: 'lda'"),
        ({"penalty": -1.0}, "not negative"),
        ({"decay": 1.5}, "between 0 and 1"),
        ({"priors": "flat"}, "'rows'.*or 'equal'"),
        ({"classes": 1}, "at least 2 classes"),
        ({"confidence": 95}, "share between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            probe(**options)


# ------------------------------------------------------------------ statistics


@pytest.mark.parametrize("cut", [1, 37, 200, 399])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_all_statistics_merge_by_addition(cut: int, offset: float) -> None:
    x = torch.randn(400, 5).double() * torch.logspace(-2, 2, 5) + offset
    labels, values = torch.randint(3, (400,)), torch.randn(400, 2).double() + 50
    yes = (torch.rand(400, 2) > 0.3).long()

    def of(kind: type, y: Tensor, part: slice, **options: object) -> object:
        one = kind(features=5, **options)
        one.add(x[part], y[part])
        return one

    for kind, targets, options in (
        (ClassStatistics, labels, {"classes": 3}),
        (TargetStatistics, values, {"targets": 2}),
        (TargetStatistics, yes, {"targets": 2, "labels": True}),
    ):
        first, second = (of(kind, targets, part, **options) for part in (slice(0, cut), slice(cut, None)))
        empty, whole = kind(features=5, **options), of(kind, targets, slice(None), **options)
        for merged in (first + second, second + first, empty + first + second, first + second + empty):
            for name in ("ridge",) if kind is TargetStatistics and "labels" not in options else ("ridge", "lda"):
                a, b = merged.solve(kind=name), whole.solve(kind=name)
                torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(a.scores(x), b.scores(x), rtol=1e-5, atol=1e-5)


def test_labels_at_once_are_labels_one_by_one() -> None:
    x = torch.randn(500, 6) * torch.logspace(0, 3, 6) + 1000
    yes = (torch.randn(500, 3) + x[:, :3] - 1000 > 0).long()
    for kind, priors in (("lda", "rows"), ("lda", "equal"), ("ridge", "rows")):
        together = TargetStatistics(features=6, targets=3, labels=True)
        together.add(x, yes)
        probe = together.solve(kind=kind, penalty=0.05, priors=priors)
        for label in range(3):
            alone = ClassStatistics(features=6, classes=2)
            alone.add(x, yes[:, label])
            single = alone.solve(kind=kind, penalty=0.05, priors=priors)
            expected = single.probabilities(x.double())[:, 1]
            torch.testing.assert_close(probe.probabilities(x.double())[:, label], expected, rtol=1e-4, atol=1e-5)
