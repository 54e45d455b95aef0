"""Probes: exact against independent solvers, streaming, merging, splits, inline read-out, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from tensordict import TensorDict

from tdhook_rl import ActivationCaching, LinearProbe, ProbeReadout
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.latent.probing import ClassStatistics, TargetStatistics
from tdhook_rl.latent.probing.linear_probe import read_columns
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tests.oracles import ridge
from tests.policies import mlp


def problem(rows: int = 400, features: int = 6, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    mix = torch.randn(features, features, generator=generator)
    return centres[labels] + torch.randn(rows, features, generator=generator) @ mix + 2.0, labels


def statistics(x: torch.Tensor, y: torch.Tensor, classes: int = 3) -> ClassStatistics:
    found = ClassStatistics(features=x.shape[-1], classes=classes)
    found.add(x, y)
    return found


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 50.0])
def test_ridge_equals_an_independent_solver(penalty: float) -> None:
    x, y = problem()
    probe = statistics(x, y).solve(kind="ridge", penalty=penalty)
    weight, bias = ridge(x.double().numpy(), y.numpy(), 3, penalty)
    np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probe.bias.numpy(), bias, rtol=1e-5, atol=1e-6)
    peer = RidgeClassifier(alpha=penalty).fit(x.numpy(), y.numpy())
    assert (probe.predict(x).numpy() == peer.predict(x.numpy())).mean() > 0.99


def test_lda_equals_scikit_learn() -> None:
    x, y = problem()
    probe = statistics(x, y).solve(kind="lda", penalty=0.0)
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(
        probe.probabilities(x.double()).numpy(), peer.predict_proba(x.double().numpy()), rtol=1e-3, atol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 398), seed=st.integers(0, 5))
def test_statistics_merge_and_do_not_depend_on_order(cut: int, seed: int) -> None:
    x, y = problem(seed=seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = statistics(x, y).solve(kind="ridge")
    merged = (statistics(x[order][:cut], y[order][:cut]) + statistics(x[order][cut:], y[order][cut:])).solve(
        kind="ridge"
    )
    torch.testing.assert_close(merged.weight, whole.weight)
    torch.testing.assert_close(merged.bias, whole.bias)


def test_shuffled_labels_are_not_decoded() -> None:
    x, y = problem(rows=4000)
    shuffled = y[torch.randperm(len(y))]
    assert statistics(x, y).solve().accuracy(x, y) > 0.6
    assert abs(statistics(x, shuffled).solve().accuracy(x, shuffled) - 1 / 3) < 0.05


def test_bad_rows_and_labels_are_refused() -> None:
    x, y = problem()
    empty = ClassStatistics(features=6, classes=4)
    for labels, features, message in (
        (y + 5, x, "labels go from 5"),
        (y, x[:, :5], "are not 400 rows of 6"),
        (y, x / 0, "NaN or infinite"),
        (y.float(), x, "class numbers"),
    ):
        with pytest.raises(InputError, match=message):
            empty.add(features, labels)
    empty.add(x, y)
    with pytest.raises(InputError, match="class 3 has no row"):
        empty.solve()
    with pytest.raises(InputError, match="'lda' or 'ridge'"):
        statistics(x, y).solve(kind="svm")
    with pytest.raises(InputError, match="do not add"):
        empty + statistics(x, y)


def test_the_inline_read_out_is_the_probe_and_can_be_replaced_live() -> None:
    net = mlp()
    x = torch.randn(200, 6)
    labels = (x[:, 0] > 0).long()
    with ActivationCaching("1").prepare(net) as hooked:
        hidden = hooked.annotate(TensorDict({"input": x}, batch_size=200))["cache"]["1"]
    probe = statistics(hidden, labels, classes=2).solve(path="1")
    blank = LinearProbe(weight=torch.zeros(2, 16), bias=torch.zeros(2), path="1")
    with ProbeReadout({"positive": blank}).prepare(net) as hooked:
        assert torch.allclose(hooked(TensorDict({"input": x}, 200))["probe", "positive"], torch.tensor(0.5))
        hooked.controls["probe.positive.weight"] = probe.weight
        hooked.controls["probe.positive.bias"] = probe.bias
        for batch in ((200,), (20, 10), ()):
            rows = x if batch == (200,) else x.reshape(20, 10, 6) if batch else x[0]
            found = hooked(TensorDict({"input": rows}, batch))["probe", "positive"]
            expected = probe.probabilities(hidden).reshape(*batch, 2) if batch else probe.probabilities(hidden)[0]
            torch.testing.assert_close(found, expected)
    assert probe.accuracy(hidden, labels) > 0.9


def test_bad_probes_are_refused() -> None:
    net = mlp()
    probe = LinearProbe(weight=torch.zeros(2, 5), bias=torch.zeros(2), path="1")
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with ProbeReadout({"a": probe}).prepare(net) as hooked, pytest.raises(InputError, match="5 features, but got 16"):
        hooked(data)
    with pytest.raises(InputError, match="which module it reads"):
        ProbeReadout({"a": LinearProbe(weight=torch.zeros(2, 5), bias=torch.zeros(2))})
    with pytest.raises(InputError, match="not a fitted LinearProbe"):
        ProbeReadout({"a": torch.zeros(2, 5)})
    with pytest.raises(InputError, match="at least one"):
        ProbeReadout({})


def test_a_split_by_row_leaks_what_a_split_by_episode_does_not() -> None:
    # A label that is a coin per episode, and features that only tell episodes apart.
    episodes, steps = 60, 20
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 2, (episodes, 1), generator=generator).expand(-1, steps)
    identity = torch.randn(episodes, 1, 64, generator=generator)
    noise = 0.3 * torch.randn(episodes, steps, 64, generator=generator)
    data = TensorDict(
        {
            "cache": {"1": identity + noise},
            "coin": label,
            "episode": torch.arange(episodes)[:, None].expand(-1, steps),
            "row": torch.arange(episodes * steps).reshape(episodes, steps),
        },
        batch_size=[episodes, steps],
    )
    scores = {}
    for by in ("row", "episode"):
        probe = OnlineProbe(features=("cache", "1"), label="coin", split=GroupSplit(by, held_out=0.3))
        scores[by] = probe.update(data)["accuracy"]
    assert scores["row"] > 0.85
    assert scores["episode"] < 0.7


def test_splits_are_stable_disjoint_and_joint() -> None:
    data = TensorDict({"a": torch.arange(4000) % 50, "b": torch.arange(4000) // 50}, batch_size=4000)
    train, held = GroupSplit("a", held_out=0.3)(data)
    assert not bool((train & held).any())
    assert bool((train | held).all())
    assert set(data["a"][train].tolist()).isdisjoint(data["a"][held].tolist())
    again = GroupSplit("a", held_out=0.3)(data[1234:])
    assert torch.equal(again[1], held[1234:])
    other = GroupSplit("a", held_out=0.3, seed=1)(data)[1]
    assert not torch.equal(other, held)
    train, held = GroupSplit("a", "b", held_out=0.3)(data)
    for key in "ab":
        assert set(data[key][train].tolist()).isdisjoint(data[key][held].tolist())
    joint = GroupSplit(["a", "b"], held_out=0.3)(data)[1]
    assert 0.25 < float(joint.float().mean()) < 0.35
    with pytest.raises(MissingKeyError, match="nearest"):
        GroupSplit("c")(data)
    with pytest.raises(InputError, match="share"):
        GroupSplit("a", held_out=1.5)


def test_rows_that_are_not_computed_are_dropped_and_counted() -> None:
    x, y = problem(classes=2)
    computed = torch.arange(len(x)) % 4 != 0
    values = torch.where(computed[:, None], x, torch.zeros_like(x))
    values[1] = float("nan")
    data = TensorDict(
        {"cache": {"1": values}, "computed": {"cache": computed}, "y": y, "row": torch.arange(len(x))}, len(x)
    )
    probe = OnlineProbe(features=("cache", "1"), label="y", split=GroupSplit("row"))
    scores = probe.update(data)
    assert scores["dropped_rows"] == 101
    assert scores["train_rows"] + scores["held_out_rows"] == 299
    with pytest.raises(MissingKeyError, match="nearest"):
        probe.update(data.exclude("y"))


def test_probes_are_saved_without_code(tmp_path) -> None:
    x, y = problem()
    probe = statistics(x, y).solve(path="module.0.module.3")
    path = probe.save(tmp_path / "probe")
    again = LinearProbe.load(path)
    assert torch.equal(again.weight, probe.weight)
    assert (again.path, again.kind, again.facts) == (probe.path, probe.kind, probe.facts)
    assert path.with_suffix(".json").is_file()
    import pickle

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({"weight": 1}))
    for name, message in (("evil", "not a readable safetensors file"), ("prob", "in that folder: .*probe.safetensors")):
        with pytest.raises(ArtifactError, match=message):
            LinearProbe.load(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="not a readable"):
        LinearProbe.load(path)


@pytest.mark.parametrize("labels", [False, True], ids=["classes", "labels"])
def test_features_that_stand_twice_change_no_discriminant(labels: bool) -> None:
    """Without a penalty the covariance has no inverse then; what it does not hold of a direction is left out."""
    x, y = problem(classes=2)
    for features in (x, torch.cat([x, x[:, :3]], 1)):
        if labels:
            sums = TargetStatistics(features=features.shape[1], targets=1, labels=True)
            sums.add(features, y[:, None].bool())
        else:
            sums = statistics(features, y, classes=2)
        found = sums.solve(kind="lda", penalty=0.0).scores(features.double())
        if features is x:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_penalties_and_kinds_that_are_not_named() -> None:
    """Without one, ridge has that of features that are scaled to variance 1."""
    x, y = problem(rows=30, classes=2)
    spread = x.double().std(0, correction=0)
    for numbers in (False, True):
        raw, scaled = (
            TargetStatistics(features=6, targets=1) if numbers else ClassStatistics(features=6, classes=2) for _ in "ab"
        )
        labels = y[:, None].double() if numbers else y
        raw.add(x, labels)
        scaled.add(x / spread, labels)
        if numbers:
            with pytest.raises(InputError, match="for numbers use kind='ridge'"):
                raw.solve(kind="lda")
        found, named = raw.solve(kind="ridge").weight, scaled.solve(kind="ridge", penalty=1e-3).weight
        torch.testing.assert_close(found * spread, named.double(), rtol=1e-5, atol=1e-6, check_dtype=False)
        assert not torch.equal(found, raw.solve(kind="ridge", penalty=2e-3).weight)


def test_a_probe_is_read_alike_where_it_is_compiled() -> None:
    """By the number of its kind, which another process may change, without a branch on it."""
    compiled = torch.compile(read_columns, backend="eager", fullgraph=True)
    scores = torch.randn(5, 3).double() + 0.5
    for code in range(6):
        torch.testing.assert_close(compiled(scores, torch.tensor(code)), read_columns(scores, torch.tensor(code)))
