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
from tdhook_rl.latent.probing import ClassStatistics, LinearProbe, Probing, TargetStatistics
from tdhook_rl.latent.probing.bank import ClassBank
from tdhook_rl.latent.probing.class_statistics import usual_penalty
from tdhook_rl.latent.probing.estimators import LowRankBilinearEstimator, MeanDifferenceClassifier
from tdhook_rl.latent.probing.held_out import Tally
from tdhook_rl.latent.probing.penalties import PENALTIES
from tdhook_rl.latent.probing.rows import Parts, Rows
from tdhook_rl.latent.probing.scaling import Scale
from tdhook_rl.latent.probing.scored import ScoredClasses, ScoredValues
from tdhook_rl.latent.probing.value_bank import ValueBank
from tdhook_rl.rollout import GroupSplit, OnlineProbe, ProbeSuite
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
        # While it has no training row it is never guessed, and later it is one of three.
        assert one.chance(0, 0) == pytest.approx(1 / 3 if lacking else 7 / 18)
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
    known = {3: [2.0, 3.0], 7: [5.0, 6.0]}
    for _ in range(200):
        tally.decay(0.5)
        tally.add(torch.tensor([9, 4]), torch.tensor([[1.0, 0.0], [2.0, 4.0]]).double())
        known = {code: [one / 2 for one in sums] for code, sums in known.items()}
        for code, (one, other) in {9: (1.0, 0.0), 4: (2.0, 4.0)}.items():
            before = known.get(code, [0.0, 0.0])
            known[code] = [before[0] + one, before[1] + other]
        found = dict(zip(tally.codes.tolist(), tally.sums.tolist(), strict=True))
        assert all(found.get(code, [0.0, 0.0]) == pytest.approx(sums, abs=1e-5) for code, sums in known.items())
    assert tally.codes.tolist() == [4, 9]
    torch.testing.assert_close(tally.sums, torch.tensor([[4.0, 8.0], [2.0, 0.0]]).double())


@pytest.mark.parametrize("seed", range(20))
def test_groups_that_are_put_together_in_one_tally_are_in_both(seed: int) -> None:
    """Also where few were met on either side: a later row of the same group is counted beside its earlier ones."""
    draw = torch.Generator().manual_seed(seed)
    one, other = Tally(width=1, groups=4), Tally(width=1, groups=4)
    known: dict[int, float] = {}
    parts = [torch.randint(0, 40, (rows,), generator=draw) for rows in (2, 3 + 3 * (seed % 2), 2)]
    for tally, codes in zip((one, other), parts, strict=False):
        tally.add(codes, torch.ones(len(codes), 1))
    folded = one.folded or other.folded
    one.merge(other)
    assert one.folded >= folded
    one.add(parts[2], torch.ones(2, 1))
    for code in torch.cat(parts).tolist():
        group = code % 4 if one.folded else code
        known[group] = known.get(group, 0.0) + 1
    assert dict(zip(one.codes.tolist(), one.sums[:, 0].tolist(), strict=True)) == known


def test_the_largest_penalty_of_those_that_do_as_well() -> None:
    """Of a single feature none changes what a discriminant tells apart; with one row of a half nothing is chosen."""
    x, labels = rows_of(3, 400, 1, [2])
    bank = ClassBank(sources=1, features=1, classes=[2])
    bank.add([x], labels, halves_of(torch.arange(400) % 2))
    assert bank.choose().tolist() == [[PENALTIES[-1]]]
    usual = {}
    for rows in (2, 4):
        values = ValueBank(sources=1, features=1, numbers=1)
        values.add([torch.arange(rows)[:, None].float()], torch.arange(rows)[:, None].double(),
                   halves_of(torch.arange(rows) % 2))  # fmt: skip
        usual[rows] = values.choose().item() == usual_penalty(1, float(rows))
    assert usual == {2: True, 4: False}


def test_means_of_large_numbers_are_taken_in_double_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = 3e4 + torch.randn(3000, 3, generator=draw), torch.arange(3000) % 2
    x[:, 0] += y
    found = MeanDifferenceClassifier(normalize=False).fit(x, y=y).coef_
    wide = x.double()
    torch.testing.assert_close(found.double(), wide[y == 1].mean(0) - wide[y == 0].mean(0), rtol=1e-6, atol=1e-6)


def test_what_a_probe_says_of_itself_where_nothing_else_was_asked() -> None:
    x, y = torch.randn(50, 3), torch.arange(50) % 2
    classes, values = ClassStatistics(features=3, classes=2), TargetStatistics(features=3, targets=1)
    classes.add(x, y)
    values.add(x, x[:, :1])
    for probe in (classes.solve(), values.solve()):
        assert (probe.path, probe.facts["rows"]) == ("", 50.0)
    assert LowRankBilinearEstimator(num_classes=2).rank == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_direction_leads_somewhere(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1e-3, 0.0], [4e-3, 4e-3], [1e-3, 0.0]], dtype=dtype)
    probe = LinearProbe(weight=weight, bias=torch.zeros(3), path="fc1")
    torch.testing.assert_close(probe.direction(1, 0).double(), torch.tensor([0.6, 0.8]).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(probe.direction(-2, 0), probe.direction(1, 2))
    assert probe.direction().dtype == dtype
    with pytest.raises(InputError, match=r"outputs 2 and 0 of this probe of 'fc1' are the same"):
        probe.direction(2, 0)
    with pytest.raises(InputError, match="positive= is one of 3 outputs of the probe, 0 to 2; got 3"):
        probe.direction(3, 0)


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


@pytest.mark.parametrize("shape", [(91, 91), (3, 64, 64), (8193,)], ids=str)
@pytest.mark.parametrize("batch", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("asked", ["class", "labels", "values"])
def test_features_whose_square_no_machine_holds_are_refused_at_once(
    asked: str, batch: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    labels = {"class": torch.zeros(batch).long(), "labels": torch.zeros(*batch, 2).long(), "values": torch.rand(batch)}
    data = TensorDict({"x": torch.zeros(*batch, *shape, dtype=torch.uint8), "label": labels[asked]}, batch)
    data["group"] = torch.arange(6).reshape(batch)
    probe = OnlineProbe(
        features="x", label="label", split=GroupSplit("group"), kind="ridge" if asked == "values" else "lda"
    )
    with pytest.raises(InputError, match=r"'x' has \d+ features a row, and a probe keeps their square: up to 8192"):
        probe.update(data)
    assert probe.statistics is None


def _late(seed: int, lacking: bool) -> TensorDict:
    """Rows of two concepts, of which one may be of one class so far."""
    x = torch.randn(240, 3, generator=torch.Generator().manual_seed(seed))
    both = (x[:, :2] > 0).long() * torch.tensor([1, 0 if lacking else 1])
    episode = torch.arange(240) // 3 + 80 * seed
    return TensorDict({"input": x, "one": both[:, 0], "late": both[:, 1], "both": both, "episode": episode}, [240])


@pytest.mark.parametrize("kind", ["suite", "labels", "ridge labels", "classes"])
def test_rows_before_there_is_a_probe_are_not_scored(kind: str) -> None:
    """While a concept has one class the others of its bank have probes, and what is held out says nothing of it: all is
    as if no row had been held out then."""
    split, found = GroupSplit("episode"), []
    for held_out_early in (True, False):
        if kind == "suite":
            own: Any = ProbeSuite(nn.Sequential(nn.Identity()), sites="0", concepts={"one": "one", "late": "late"},
                                  split=split, untrained=False)  # fmt: skip
        else:
            label, how = ("late", "lda") if kind == "classes" else ("both", "ridge" if "ridge" in kind else "lda")
            own = OnlineProbe(features="input", label=label, split=split, kind=how)  # type: ignore[arg-type]
        for seed in range(6):
            data = _late(seed, lacking=seed < 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own.update(data if held_out_early or seed >= 4 else data[split(data)[0]])
            if seed == 3 and kind == "suite":
                early = own.table()["0", "late"]
                assert math.isnan(early.trained.estimate)
                assert math.isnan(early.auc.estimate)
        if kind == "suite":
            cell = own.table()["0", "late"]
            found.append((cell.trained, cell.auc, cell.input))
        else:
            suffix = "" if kind == "classes" else ".1"
            found.append((own.scores["accuracy" + suffix], own.scores["auc" + suffix]))
    assert found[0] == found[1]
    assert found[0][1].estimate > 0.98  # read perfectly; rows without a probe made it .8


def test_labels_by_chance_that_lack_a_class_are_no_control() -> None:
    """They are drawn from the first rows: a guess among two classes is right more often than one among three."""
    own = ProbeSuite(nn.Sequential(nn.Identity()), sites="0", concepts={"coin": "coin"}, split=GroupSplit("episode"))
    for seed, classes in ((0, 2), (1, 3)):
        draws = torch.Generator().manual_seed(seed)
        rows = {"input": torch.randn(1200, 3, generator=draws), "episode": torch.arange(1200) + 1200 * seed}
        coin = torch.randint(classes, (1200,), generator=draws)
        own.update(TensorDict({**rows, "coin": coin}, [1200]))
        cell = own.table()["0", "coin"]
        assert cell.selectivity is not None
        assert cell.selectivity.known == (classes == 2)
    assert cell.shuffled.estimate > cell.trained.low > 0.37  # by which selectivity was negative
    assert cell.selectivity.words == "one of the two has no training row of class 2"
    assert cell.selectivity.words in str(own.table())


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("kind", ["suite", "online", "added up"])
def test_chance_is_that_of_the_classes_that_were_known(kind: str, classes: int) -> None:
    """Of a coin that has two sides at first: what is scored then is right by chance more often than later."""
    split = GroupSplit("episode", held_out=0.5)
    options: dict[str, Any] = {"sites": "0", "concepts": {"coin": "coin"}, "split": split, "untrained": False}
    net, found = nn.Sequential(nn.Identity()), []

    def right(known: int) -> float:
        """Of a guess: the first classes have rows from either time, in these shares."""
        early, late = 1 / known, 1 / classes
        first = (early * early + late * late) / (early + late)
        return (known * first + (classes - known) * late) / classes

    for known in (2, classes):
        suites = [ProbeSuite(net, **options) for _ in range(2)]
        online = OnlineProbe(features="input", label="coin", split=split, classes=classes)
        for part in range(4):
            draws = torch.Generator().manual_seed(part)
            coin = torch.randint(known if part < 2 else classes, (1000,), generator=draws)
            data = TensorDict({"input": torch.randn(1000, 3, generator=draws), "coin": coin}, [1000])
            data["episode"] = torch.arange(1000) + 1000 * part
            online.update(data)
            suites[part // 2 if kind == "added up" else 0].update(data)
        if kind == "online":
            found.append((online.scores["accuracy"], online.words))
        else:
            cell = (suites[0] + suites[1] if kind == "added up" else suites[0]).table()["0", "coin"]
            assert cell.chance == pytest.approx(right(known), abs=0.01)
            found.append((cell.trained, cell.words))
    (fewer, told), (always, nothing) = found
    assert ("judged while fewer classes were known" in told, nothing) == (True, "")
    assert fewer.low > 1 / classes  # which was taken for chance
    assert right(2) in fewer
    assert 1 / classes in always
