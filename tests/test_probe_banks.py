"""Many probes from shared sums: each is the probe that it would be alone, and sums add up."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.latent.probing import ClassStatistics
from tdhook_rl.latent.probing.bank import ClassBank
from tdhook_rl.latent.probing.class_statistics import usual_penalty
from tdhook_rl.latent.probing.held_out import HitTally, ScoreHistograms
from tdhook_rl.latent.probing.penalties import PENALTIES
from tdhook_rl.latent.probing.rows import Parts, Rows, usable_rows
from tdhook_rl.latent.probing.scored import ScoredClasses, ScoredValues
from tdhook_rl.latent.probing.value_bank import ValueBank
from tdhook_rl.statistics import Interval


def rows_of(seed: int, rows: int, features: int, classes: list[int], offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features whose means depend on each concept's class, mixed and moved away from zero."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(0, count, (rows,), generator=draw) for count in classes], 1)
    x = torch.randn(rows, features, generator=draw, dtype=torch.float64)
    for place in range(len(classes)):
        x[:, place % features] += labels[:, place]
    mixed = x @ torch.randn(features, features, generator=draw, dtype=torch.float64) + offset
    return mixed.float(), labels


def halves_of(numbers: Tensor) -> list[Tensor]:
    """The rows of each half, of the number of the half of each row."""
    return [(numbers == half).nonzero().squeeze(-1) for half in (0, 1)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999), features=st.integers(1, 40), classes=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    penalty=st.sampled_from([None, 1e-4, 0.1]), priors=st.sampled_from(["equal", "rows"]),
    offset=st.sampled_from([0.0, 300.0]), constant=st.booleans(), absent=st.booleans(),
)  # fmt: skip
def test_each_concept_has_the_probe_that_it_would_have_alone(
    seed: int, features: int, classes: list[int], penalty: float | None, priors: str, offset: float, constant: bool,
    absent: bool,
) -> None:  # fmt: skip
    x, labels = rows_of(seed, 600, features, classes, offset)
    if constant:
        x[:, -1] = 7.0
    if absent and classes[0] > 2:
        labels[:, 0].clamp_(max=classes[0] - 2)
    bank = ClassBank(sources=1, features=features, classes=classes)
    for part in range(0, 600, 200):
        bank.add([x[part : part + 200]], labels[part : part + 200], halves_of(torch.arange(200) % 2))
    probes = bank.solve(None if penalty is None else torch.full((1, len(classes)), penalty).double(), priors)
    found = probes.scores([x])[:, 0]
    for place, count in enumerate(classes):
        alone = ClassStatistics(features=features, classes=count)
        for part in range(0, 600, 200):
            alone.add(x[part : part + 200], labels[part : part + 200, place])
        probe = alone.solve(kind="lda", penalty=penalty, priors=priors, absent="never")
        there = alone.there
        expected = probe.scores(x.double())
        scale = expected[:, there].abs().max() + 1
        # Weights are stored in float32: far from zero they move every score by as much.
        assert (found[:, place, :count] - expected)[:, there].abs().max() < 1e-5 * scale * (1 + offset)
        if count == 2:
            middle, spread = alone.margin(probe)
            assert math.isclose(float(probes.spread[0, place]), spread, rel_tol=1e-4, abs_tol=1e-6)
            assert abs(float(probes.middle[0, place]) - middle) < 1e-4 * (1 + offset) * (1 + spread)
            apart = probe.facts["means_apart"]
            assert math.isclose(float(probes.apart[0, place]), apart, rel_tol=1e-4, abs_tol=1e-5 * (1 + offset))


@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("lost", [None, "some", "all"])
@pytest.mark.parametrize("penalty", [None, 1e-2])
def test_sources_that_learn_together_find_what_each_finds_alone(
    kind: str, lost: str | None, penalty: float | None
) -> None:
    x, labels = rows_of(4, 900, 7, [2, 3], offset=20.0)
    wanted = labels if kind == "classes" else torch.stack([x[:, 0] * 3 + 100, x[:, 1] ** 2], 1)
    sources = [x, torch.tanh(x - 20), torch.randn(900, 7, generator=torch.Generator().manual_seed(0))]
    sources[1][:, 2] = 5.0  # constant in one of them
    if lost is not None:
        sources[2][slice(100 if lost == "all" else 30)] = torch.nan  # "all" of the first batch
    codes = [torch.arange(900) // 9, torch.arange(900) % 40]
    options = {"groupings": 2, "penalty": penalty, "confidence": 0.95, "min_rows": 5}

    def found(chosen: list[Tensor]) -> list[dict[str, Any]]:
        one: Any = (
            ScoredClasses(sources=len(chosen), features=7, classes=[2, 3], areas=2, **options)  # type: ignore[arg-type]
            if kind == "classes"
            else ScoredValues(sources=len(chosen), features=7, numbers=2, **options)  # type: ignore[arg-type]
        )
        for start, stop in ((0, 100), (100, 500), (500, 900)):
            part = [code[start:stop] for code in codes]
            held = part[0] % 4 == 0
            features = [one[start:stop] for one in chosen]
            usable = usable_rows(features, wanted[start:stop])
            one.learn(Rows(features, wanted[start:stop], Parts(part, ~held, held), usable))
            one.fit()
            one.judge(Rows(features, wanted[start:stop], Parts(part, ~held, held), usable))
            one.decay(0.9)
        return [
            {
                "weight": one.probe(source, place, "", {}).weight, "penalty": one.probes.penalty[source, place],
                **one.found(source, place), "majority": one.majority(source, place),
            }
            for source in range(len(chosen)) for place in (0, 1)
        ]  # fmt: skip

    together = found(sources)
    alone = [cell for source in sources for cell in found([source])]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.pop("weight"), other.pop("weight"), rtol=1e-4, atol=1e-5)
        assert float(one.pop("penalty")) == float(other.pop("penalty"))
        for name, value in one.items():
            if isinstance(value, Interval):
                assert value.rows == pytest.approx(other[name].rows)
                assert value.groups == other[name].groups
                assert [value.low, value.estimate, value.high] == pytest.approx(
                    [other[name].low, other[name].estimate, other[name].high], abs=1e-6
                )
            else:
                assert value == pytest.approx(other[name])


@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_sums_of_workers_add_up(kind: str, order: tuple[int, ...]) -> None:
    x, labels = rows_of(3, 900, 8, [2, 4], offset=50.0)
    wanted = labels if kind == "classes" else torch.stack([x[:, 0] * 2 + 1000, x[:, 1] ** 2], 1)

    def bank() -> ClassBank | ValueBank:
        if kind == "classes":
            return ClassBank(sources=2, features=8, classes=[2, 4])
        return ValueBank(sources=2, features=8, numbers=2)

    halves, other = torch.arange(900) % 3 % 2, x.square()
    whole, parts = bank(), []
    whole.add([x, other], wanted, halves_of(halves))
    for number in order:
        part = bank()
        chosen = torch.arange(900) // 300 == number
        part.add([x[chosen], other[chosen]], wanted[chosen], halves_of(halves[chosen]))
        parts.append(part)
    merged = bank()
    for part in parts:
        merged = merged + part  # type: ignore[operator]
    torch.testing.assert_close(merged.solve().weight, whole.solve().weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.solve().bias, whole.solve().bias, rtol=1e-6, atol=1e-5)
    assert torch.equal(merged.choose(), whole.choose())


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_numbers_are_those_of_scikit_learn(penalty: float, offset: float) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, _ = rows_of(1, 500, 6, [2], offset)
    values = torch.stack([x[:, 0] - x[:, 1] + torch.randn(500), x[:, 2] * 30 + 7], 1)
    bank = ValueBank(sources=1, features=6, numbers=2)
    bank.add([x[:100]], values[:100], [torch.arange(100), torch.arange(0)])
    bank.add([x[100:]], values[100:], [torch.arange(0), torch.arange(400)])
    found = bank.solve(torch.full((1, 2), penalty).double()).predict([x])[:, 0].numpy()
    other = make_pipeline(StandardScaler(), Ridge(alpha=penalty * 500)).fit(x.double().numpy(), values.double().numpy())
    np.testing.assert_allclose(found, other.predict(x.double().numpy()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "features", "mixed"), [(80, 60, False), (80, 60, True), (20_000, 6, True)])
def test_the_penalty_is_the_best_across_halves(rows: int, features: int, mixed: bool) -> None:
    x, labels = rows_of(5, rows, features, [2])
    if not mixed:
        x = torch.randn(rows, features, generator=torch.Generator().manual_seed(1)) + labels
    halves = torch.arange(rows) % 2
    bank = ClassBank(sources=1, features=features, classes=[2])
    bank.add([x], labels, halves_of(halves))
    chosen = float(bank.choose())
    assert mixed or chosen >= 0.1  # features that are independent, and hardly more rows: the nearest mean is better

    def accuracy(penalty: float) -> float:
        """By counting rows of the other half."""
        right = []
        for half in (0, 1):
            alone = ClassStatistics(features=features, classes=2)
            alone.add(x[halves == half], labels[halves == half, 0])
            probe = alone.solve(kind="lda", penalty=penalty, priors="equal")
            right.append(probe.accuracy(x[halves != half], labels[halves != half, 0]))
        return sum(right) / 2

    assert accuracy(chosen) > max(accuracy(one) for one in PENALTIES) - (0.02 if rows < 100 else 0.002)


def test_the_penalty_of_numbers_is_the_best_across_halves() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 50, generator=draw)
    for noise, least in ((5.0, 0.1), (0.0, 0.0)):
        values = x[:, :1] + noise * torch.randn(60, 1, generator=draw)
        bank = ValueBank(sources=1, features=50, numbers=1)
        bank.add([x], values, halves_of(torch.arange(60) % 2))
        assert (float(bank.choose()) >= 0.1) == (least > 0)


def test_a_class_that_comes_late_widens_its_concept() -> None:
    x, labels = rows_of(2, 1200, 5, [2, 4])
    codes = [torch.arange(1200) % 40]
    held = codes[0] % 4 == 0
    late, whole = (
        ScoredClasses(
            sources=1, features=5, classes=classes, groupings=1, areas=2, penalty=1e-3, confidence=0.95, min_rows=5
        )
        for classes in ([2, 2], [2, 4])
    )
    few = labels[:, 1] < 2
    for chosen in (few, ~few):
        part = Rows([x[chosen]], labels[chosen], Parts([codes[0][chosen]], ~held[chosen], held[chosen]))
        if chosen is not few:
            late.widen(1, 4)
        for one in (late, whole):
            one.learn(part)
            one.fit()
            one.judge(part)
    for concept in (0, 1):
        assert late.found(0, concept)["accuracy"] == whole.found(0, concept)["accuracy"]
    assert "auc" in late.found(0, 0)
    assert "auc" not in late.found(0, 1)
    assert late.found(0, 0)["auc"] == whole.found(0, 0)["auc"]


def test_a_concept_is_widened_again_and_again() -> None:
    x, labels = rows_of(4, 900, 4, [5, 2])
    late, whole = ClassBank(sources=1, features=4, classes=[2, 2]), ClassBank(sources=1, features=4, classes=[5, 2])
    for least, most in ((0, 2), (2, 3), (3, 5)):
        chosen = (labels[:, 0] >= least) & (labels[:, 0] < most)
        if most > 2:
            late.widen(0, most)
        for bank in (late, whole):
            bank.add([x[chosen]], labels[chosen], halves_of(torch.arange(int(chosen.sum())) % 2))
        assert late.count.shape[-1] == late.total.shape[-2] == most
    assert late.classes == whole.classes
    torch.testing.assert_close(late.solve().weight, whole.solve().weight)
    torch.testing.assert_close(late.solve().bias, whole.solve().bias)


def bank_of(kind: str, sources: int, features: int) -> ClassBank | ValueBank:
    if kind == "classes":
        return ClassBank(sources=sources, features=features, classes=[2, 3])
    return ValueBank(sources=sources, features=features, numbers=2)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_rows_that_a_source_lacks_count_for_nothing_there(kind: str) -> None:
    x, labels = rows_of(3, 400, 5, [2, 3])
    wanted = labels if kind == "classes" else labels + 0.5 * x[:, :2].double() + 30
    usable = torch.rand(2, 400) < 0.6
    sources = [x.clone(), 2 * x.flip(1) - 7]
    for one, seen in zip(sources, usable, strict=True):
        one[~seen] = math.nan
    halves, both = torch.arange(400) % 2, bank_of(kind, 2, 5)
    both.add(sources, wanted, halves_of(halves), usable)
    for source, seen in enumerate(usable):
        alone = bank_of(kind, 1, 5)
        alone.add([sources[source][seen]], wanted[seen], halves_of(halves[seen]))
        torch.testing.assert_close(both.solve().weight[source], alone.solve().weight[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both.solve().bias[source], alone.solve().bias[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(both.choose()[source], alone.choose()[0])


def scored(kind: str, features: int, penalty: float | None = None) -> ScoredClasses | ScoredValues:
    options: dict[str, Any] = {"penalty": penalty, "confidence": 0.95, "min_rows": 5}
    if kind == "classes":
        return ScoredClasses(sources=1, features=features, classes=[2, 3], groupings=1, areas=1, **options)
    return ScoredValues(sources=1, features=features, numbers=2, groupings=1, **options)


def parts_of(kind: str, seed: int, rows: int, features: int, first: int = 0, usable: Tensor | None = None) -> Rows:
    """Rows in groups of ten, of which a quarter is held out."""
    x, labels = rows_of(seed, rows, features, [2, 3])
    wanted = labels if kind == "classes" else labels + 0.5 * x[:, :2].double() + 30
    codes = (first + torch.arange(rows) // 10) * 7919 % 100_003
    held = torch.arange(rows) // 10 % 4 == 0
    return Rows([x], wanted, Parts([codes], ~held, held), usable)


@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_penalties_are_chosen_again_where_there_are_three_times_as_many_rows(
    kind: str, some: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scored(kind, 6)
    chosen_at: list[int] = []
    choose = type(one.bank).choose
    monkeypatch.setattr(type(one.bank), "choose", lambda bank: chosen_at.append(number) or choose(bank))
    for number in range(1, 13):
        usable = (torch.arange(160) // 10 % 8 < 4)[None] if some and number < 4 else None
        one.learn(parts_of(kind, number, 160, 6, 16 * number, usable))
        one.fit()
    # Batches of 120 rows that train, of which at first 60 are in no source: these are none.
    assert chosen_at == ([1, 3, 6] if some else [1, 3, 9])


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_workers_together_choose_their_penalty_anew_and_then_as_ever(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = scored(kind, 30), scored(kind, 30)
    few.learn(parts_of(kind, 1, 80, 30))
    many.learn(parts_of(kind, 2, 4000, 30, 100))
    for one in (few, many):
        one.fit()
    alone = few.probes.penalty.clone()
    for merged in (few + many, many + few):
        assert torch.equal(merged.probes.penalty, merged.bank.choose())
        assert not torch.equal(merged.probes.penalty, alone)
    chosen: list[int] = []
    monkeypatch.setattr(type(few.bank), "choose", lambda bank: chosen.append(1))
    merged.learn(parts_of(kind, 3, 400, 30, 1000))
    merged.fit()
    assert not chosen


@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("penalty", [None, 1e-2])
def test_what_workers_have_scored_adds_up(kind: str, penalty: float | None) -> None:
    """By one probe, the scores of parts are those of the whole; a worker that scored nothing changes nothing."""
    whole = scored(kind, 6, penalty)
    whole.learn(parts_of(kind, 1, 400, 6))
    whole.fit()
    blank, first, second = (copy.deepcopy(whole) for _ in range(3))
    if kind == "values":
        second.bank.target_shift = second.bank.target_shift + 5.0  # as of a worker whose first rows were others
    parts = [parts_of(kind, 2, 200, 6, 500), parts_of(kind, 3, 300, 6, 700)]
    for one, part in zip((first, second), parts, strict=True):
        one.judge(part)
        whole.judge(part)
    for merged in (first + second, blank + first + second, first + blank + second, second + first + blank):
        for concept in (0, 1):
            for name, expected in whole.found(0, concept).items():
                found = merged.found(0, concept)[name]
                assert (found.rows, found.groups) == (expected.rows, expected.groups)
                ends = (expected.low, expected.estimate, expected.high)
                assert (found.low, found.estimate, found.high) == pytest.approx(ends, abs=1e-6)
    assert math.isnan((blank + blank).score(0, 0).estimate)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_words_of_what_is_not_there_yet(kind: str) -> None:
    one, rows = scored(kind, 6), parts_of(kind, 1, 400, 6)
    assert "no probe yet" in one.words(0, 1)
    one.learn(rows)
    one.fit()
    assert "no held-out row yet" in one.words(0, 1)
    one.judge(rows)
    assert one.words(0, 1) == ""


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_a_row_in_each_half_chooses_nothing(kind: str) -> None:
    x, labels = rows_of(5, 2, 4, [2, 3])
    labels[:] = torch.tensor([[0, 0], [1, 1]])
    bank = bank_of(kind, 1, 4)
    bank.add([x], labels if kind == "classes" else labels.double(), [torch.tensor([0]), torch.tensor([1])])
    assert bank.choose().tolist() == [[usual_penalty(4, 2)] * 2]


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_an_error_of_long_ago_does_not_open_the_interval(factor: float) -> None:
    """What a decay has left of it is less than a row: as sure as without it."""
    labels = torch.arange(200) // 50 % 2
    of_class = torch.nn.functional.one_hot(labels, 2).bool()
    codes = [torch.arange(200) % 50]
    with_error, without = (HitTally(columns=2, groupings=1) for _ in range(2))
    for tally, first in ((with_error, ~of_class & of_class.roll(1)), (without, of_class)):
        wrong = of_class.clone()
        wrong[:20] = False
        tally.add(codes, of_class, wrong if tally is with_error else first)
        for _ in range(120):
            tally.decay(factor)
            tally.add(codes, of_class, of_class)
    chosen = torch.ones(2, dtype=torch.bool)
    one, other = with_error.accuracy(chosen, 0.95), without.accuracy(chosen, 0.95)
    assert one.low > other.low - 0.02
    assert other.low > 0.9
    areas = [ScoreHistograms(labels=1, groupings=1) for _ in range(2)]
    for place, histograms in enumerate(areas):
        scores = labels.double()[:, None].clone()
        scores[0] = 5.0 * (1 - place)
        middle, spread = torch.tensor([0.5]).double(), torch.tensor([0.1]).double()
        histograms.add(codes, scores, labels[:, None] == 1, middle, spread)
        for _ in range(120):
            histograms.decay(factor)
            histograms.add(codes, labels.double()[:, None], labels[:, None] == 1, middle, spread)
    assert areas[0].area(0, 0.95).low > areas[1].area(0, 0.95).low - 0.02


@pytest.mark.parametrize("groups", [4, 12, 60])
@pytest.mark.parametrize("kind", ["accuracy", "r2"])
def test_differences_cover_at_their_rate(groups: int, kind: str) -> None:
    """Groups differ in how hard they are, for both alike: the difference is surer than the two."""
    draws = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        if kind == "accuracy":
            hard = draws.normal(0, 0.5, (groups, 1))
            shares = [1 / (1 + np.exp(-(level + hard))) for level in (1.5, 0.5)]
            rows = np.full((groups, 2), 20)
            right = [draws.binomial(rows, np.broadcast_to(share, rows.shape)) for share in shares]
            found = statistics.accuracy_difference(right[0], rows, right[1], rows)
            wide = draws.normal(0, 0.5, 20_000)
            truth = np.mean(1 / (1 + np.exp(-(1.5 + wide)))) - np.mean(1 / (1 + np.exp(-(0.5 + wide))))
        else:
            values = draws.normal(0, 1, (groups, 30))
            scale = np.exp(draws.normal(0, 0.2, (groups, 1)))
            errors = [(level * scale * draws.normal(0, 1, values.shape)) ** 2 for level in (0.5, 0.8)]
            sums = [
                np.stack([np.full(groups, 30.0), values.sum(1), (values**2).sum(1), error.sum(1)], 1)
                for error in errors
            ]
            found = statistics.r_squared_difference(*sums)
            truth = (0.8**2 - 0.5**2) * math.exp(2 * 0.2**2)
        covered.append(truth in found)
    assert np.mean(covered) > 0.9


@pytest.mark.parametrize("groups", [1, 0])
def test_differences_of_one_group_have_no_interval(groups: int) -> None:
    counts = np.full((groups, 2), 10.0)
    found = statistics.accuracy_difference(counts * 0.8, counts, counts * 0.5, counts)
    assert not found.known
    assert found.words
    sums = np.array([[10, 0.0, 10.0, 4.0]])[:groups].reshape(-1, 4)
    assert not statistics.r_squared_difference(sums, sums).known


@pytest.mark.parametrize("prevalence", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("groups", [2, 10, 50, 200])
def test_intervals_of_planted_concepts_cover_or_say_that_there_is_none(prevalence: float, groups: int) -> None:
    """Groups differ in how strong the signal is; the truth is the accuracy over all groups there could be."""
    draw = torch.Generator().manual_seed(groups)
    covered, known, tries = 0, 0, 80

    def rows_of_groups(count: int) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.arange(count).repeat_interleave(40)
        label = (torch.rand(len(group), generator=draw) < prevalence).long()
        signal = 1.5 + 0.6 * torch.randn(count, generator=draw)
        x = torch.randn(len(group), 2, generator=draw)
        x[:, 0] += signal[group] * (label - 0.5)
        return x, label[:, None], group

    x, label, group = rows_of_groups(2000)
    none, all_rows = torch.zeros(len(group), dtype=torch.bool), torch.ones(len(group), dtype=torch.bool)
    fitted = ScoredClasses(
        sources=1, features=2, classes=[2], groupings=1, areas=0, penalty=1e-3, confidence=0.95, min_rows=4
    )  # fmt: skip
    fitted.learn(Rows([x], label, Parts([group], all_rows, none)))
    fitted.fit()
    assert fitted.probes is not None
    truth_x, truth, _ = rows_of_groups(20_000)
    right = fitted.probes.scores([truth_x])[:, 0, 0].argmax(-1) == truth[:, 0]
    expected = sum(float(right[truth[:, 0] == side].double().mean()) for side in (0, 1)) / 2
    for _ in range(tries):
        one = copy.deepcopy(fitted)
        x, label, group = rows_of_groups(groups)
        one.judge(Rows([x], label, Parts([group], torch.zeros_like(group).bool(), torch.ones_like(group).bool())))
        score = one.score(0, 0)
        known += score.known
        covered += score.known and expected in score
        assert score.known or score.words
    assert covered >= 0.88 * known
    if groups * 40 * prevalence > 40:
        assert known == tries
