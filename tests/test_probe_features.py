"""Probes on features as networks give them: far from zero, of all scales, constant, massive, in every float format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.latent.probing import (
    BilinearEstimator,
    ClassStatistics,
    LinearEstimator,
    LowRankBilinearEstimator,
    MeanDifferenceClassifier,
    TargetStatistics,
)
from tdhook_rl.rollout import GroupSplit, OnlineProbe

ROWS, WIDTH = 4096, 16
SPLIT = GroupSplit("episode")
SCALES = torch.logspace(0, 3, WIDTH)


def _massive(z: Tensor) -> Tensor:
    z = z.clone()
    z[:, 5] = 4000 + 300 * z[:, 5]
    z[:, 9] = torch.where(torch.rand(len(z)) < 0.01, 9000.0, 0.0)
    return z


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda z: z,
    "offset 1e4": lambda z: z + 1e4,
    "offset -1e4, small": lambda z: 0.1 * z - 1e3,
    "offsets of all sizes": lambda z: z + torch.logspace(0, 4, WIDTH),
    "scales": lambda z: z * SCALES,
    "scales, offset": lambda z: (z + 30) * SCALES,
    "tiny": lambda z: z * 1e-6,
    "huge": lambda z: z * 1e8,
    "massive": _massive,
    "constant": lambda z: torch.cat([z[:, :8], torch.full((len(z), 4), 7.5), torch.zeros(len(z), 4)], 1) + 3000,
    "copies": lambda z: torch.cat([z[:, :8], z[:, :8]], 1),
    "more features than rows matter": lambda z: torch.cat([z, z @ torch.randn(WIDTH, 40) + 5], 1),
    "the label itself": lambda z: torch.cat([z, (z[:, :1] > 0).float() * 1e3], 1),
}


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, WIDTH, generator=generator)
    return z, (z[:, 0] + 0.3 * torch.randn(ROWS, generator=generator) > 0).long()


def data_of(features: Tensor, labels: Tensor) -> TensorDict:
    return TensorDict({"f": features, "y": labels, "episode": torch.arange(len(labels)) // 4}, [len(labels)])


def reference(features: Tensor, labels: Tensor, train: Tensor, held: Tensor, model: object) -> float:
    model = make_pipeline(StandardScaler(), model).fit(features[train].double().numpy(), labels[train].numpy())
    return balanced_accuracy_score(labels[held], model.predict(features[held].double().numpy()))


# ------------------------------------------------------------------ discriminants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FEATURES)
def test_a_discriminant_is_as_good_as_on_standardised_features(name: str, dtype: torch.dtype) -> None:
    z, labels = drawn()
    features = FEATURES[name](z).to(dtype)
    data = data_of(features, labels)
    train, held = SPLIT(data)
    expected = reference(features, labels, train, held, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-3))
    for batches in (1, 7):  # the sums stream
        one = OnlineProbe(features="f", label="y", split=SPLIT)
        for part in data.chunk(batches):
            reported = one.update(part)["accuracy"]
        read = balanced_accuracy_score(labels[held], one.probe.predict(features[held]))
        assert read > expected - 0.01
        if batches == 1:
            assert reported == pytest.approx(read)


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1, 1.0, 10.0])
def test_the_penalty_of_a_discriminant_means_the_same_at_every_scale_and_offset(penalty: float) -> None:
    z, labels = drawn()
    plain = ClassStatistics(features=WIDTH, classes=2)
    plain.add(z.double(), labels)
    expected = plain.solve(penalty=penalty).probabilities(z.double())
    for scale, offset in ((SCALES, 0.0), (1e-6, 0.0), (SCALES.flip(0), 1e4), (torch.rand(WIDTH) + 1, -77.0)):
        x = z.double() * scale + offset
        moved = ClassStatistics(features=WIDTH, classes=2)
        moved.add(x, labels)
        torch.testing.assert_close(moved.solve(penalty=penalty).probabilities(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 100.0])
def test_the_penalty_of_ridge_is_scikit_learns_alpha(alpha: float) -> None:
    z, labels = drawn()
    x = (z * torch.logspace(0, 2, WIDTH) + 1e4).double()
    sums = ClassStatistics(features=WIDTH, classes=2)
    sums.add(x, labels)
    model = RidgeClassifier(alpha=alpha).fit(x.numpy(), labels.numpy())
    probe = sums.solve(kind="ridge", penalty=alpha)
    margin = (probe.scores(x)[:, 1] - probe.scores(x)[:, 0]).numpy()
    np.testing.assert_allclose(margin, model.decision_function(x.numpy()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_ridge_without_a_penalty_is_as_good_as_on_standardised_features(name: str, numbers: bool) -> None:
    z, classes = drawn()
    labels = z[:, 0] - 2 * z[:, 3] + 0.1 * classes if numbers else classes
    features = FEATURES[name](z)
    one = OnlineProbe(features="f", label="y", split=GroupSplit("episode"), kind="ridge")
    data = data_of(features, labels)
    train, held = GroupSplit("episode")(data)
    found = one.update(data)
    if numbers:
        model = make_pipeline(StandardScaler(), Ridge(alpha=1e-3))
        model.fit(features[train].double().numpy(), labels[train].numpy())
        expected = r2_score(labels[held].numpy(), model.predict(features[held].double().numpy()))
        assert found["r2"] > expected - 0.01
    else:
        expected = reference(features, labels, train, held, RidgeClassifier(alpha=1e-3))
        assert found["accuracy"] > expected - 0.01


def test_singular_features_are_solved_as_least_squares() -> None:
    z, labels = drawn()
    x = torch.cat([z, z, torch.ones(ROWS, 3)], 1).double()
    sums = ClassStatistics(features=x.shape[1], classes=2)
    sums.add(x, labels)
    for kind in ("lda", "ridge"):
        probe = sums.solve(kind=kind, penalty=0.0)
        assert probe.accuracy(x, labels) > 0.88
        assert torch.isfinite(probe.weight).all()
    blind = ClassStatistics(features=3, classes=2)
    blind.add(x[:, -3:], labels)
    for kind in ("lda", "ridge"):
        assert torch.equal(blind.solve(kind=kind).weight, torch.zeros(2, 3))


def test_three_classes_in_which_one_is_rare() -> None:
    labels = torch.tensor([0] * 2000 + [1] * 2000 + [2] * 96)
    x = (torch.randn(ROWS, WIDTH) + 2 * torch.eye(WIDTH)[labels]) * SCALES + 1e4
    sums = ClassStatistics(features=WIDTH, classes=3)
    sums.add(x, labels)
    model = LinearDiscriminantAnalysis(solver="svd", priors=[1 / 3] * 3)  # "lsqr" weighs covariances by the priors
    expected = make_pipeline(StandardScaler(), model).fit(x.double().numpy(), labels).predict(x.double().numpy())
    agree = (sums.solve(penalty=0.0, priors="equal").predict(x).numpy() == expected).mean()
    assert agree > 0.995


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_features_of_other_types(dtype: torch.dtype) -> None:
    z, labels = drawn()
    features = (z * 20 + 100).clamp(0, 255).to(dtype) if dtype != torch.bool else z > 0
    one = OnlineProbe(features="f", label="y", split=SPLIT)
    assert one.update(data_of(features, labels))["accuracy"] > 0.85
    assert one.probe.probabilities(features).dtype == (dtype if dtype.is_floating_point else torch.float32)


# ------------------------------------------------------------------ torch estimators


@pytest.mark.parametrize("name", sorted(set(FEATURES) - {"massive"}))
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_estimator_is_as_good_as_on_standardised_features(name: str, bias: bool) -> None:
    z, labels = drawn()
    x, labels = FEATURES[name](z)[:1000], labels[:1000]
    everything = torch.ones(1000, dtype=torch.bool)
    expected = reference(x, labels, everything, everything, LogisticRegression(max_iter=1000))
    fitted = LinearEstimator(num_classes=2, seed=0, epochs=60, bias=bias).fit(x, y=labels)
    right = (fitted.predict(x) == labels).float().mean().item()
    # Without an intercept, what is far from zero is not told apart in so few steps.
    assert right > expected - 0.02 or (not bias and float(x.mean(0).abs().max() / x.std(0).clamp_min(1e-9).min()) > 10)
    if bias:
        scores = x.double() @ fitted.weights["weight"].double().T + fitted.weights["bias"]
        assert torch.equal(scores.argmax(-1), fitted.predict(x))  # its weights are those of x as it is


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 0.0), (1.0, 1000.0), (100.0, -5000.0)])
def test_regressions_and_products_at_any_scale(scale: float, offset: float) -> None:
    z, b = torch.randn(800, 3), torch.randn(800, 2)
    x = z * scale + offset
    y = (2 * z[:, 0] - z[:, 1]) * scale + offset
    fitted = LinearEstimator(seed=0, epochs=60).fit(x, y=y)
    wrong = (fitted.predict(x.double()) - y).square().mean() / y.var()
    assert wrong < 1e-2
    same = (z[:, 0] * b[:, 0] > 0).long()
    for kind in (BilinearEstimator, LowRankBilinearEstimator):
        product = kind(num_classes=2, seed=0, epochs=40, lr=0.05).fit(x, b * scale - offset, y=same)
        assert (product.predict(x, b * scale - offset) == same).float().mean() > 0.9
    half = MeanDifferenceClassifier().fit(x, y=(z[:, 0] > 0).long())
    assert (half.predict(x) == (z[:, 0] > 0)).float().mean() > 0.9


# ------------------------------------------------------------------ kinds that travel


def hooked_with(blank: LinearProbe, net: nn.Module) -> object:
    return Compose(ActivationCaching("1"), ProbeReadout({"y": blank})).prepare(net)


@pytest.mark.parametrize("before", ["lda", "ridge"])
@pytest.mark.parametrize("after", ["lda", "ridge", "labels lda", "labels ridge", "values"])
def test_what_is_pushed_reads_as_its_own(before: str, after: str) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(500, 5)
    targets = torch.stack([x[:, 0], -x[:, 1]], 1)
    data = TensorDict({"input": x, "y": targets, "row": torch.arange(500)}, [500])
    if after.startswith("labels"):
        data["y"] = targets > 0
    elif after != "values":
        data["y"] = (targets[:, 0] > 0).long()
    kind = {"values": "ridge"}.get(after, after.split()[-1])
    blank = LinearProbe(weight=torch.zeros(2, 8), bias=torch.zeros(2), path="1", kind=before)
    one = OnlineProbe(features=("cache", "1"), label="y", kind=kind, split=GroupSplit("row"))
    with hooked_with(blank, net) as hooked:
        assert not one.push(hooked.controls, "probe.y")
        one.update(hooked(data.clone()))
        assert one.push(hooked.controls, "probe.y")
        seen = hooked(data.clone())
        hidden = seen["cache", "1"]
        expected = one.probe.predict(hidden) if after == "values" else one.probe.probabilities(hidden)
        torch.testing.assert_close(seen["probe", "y"], expected)
        set_again = LinearProbe(weight=torch.ones(2, 8), bias=torch.zeros(2), path="1", kind=before)
        hooked.controls.update_(set_again.controls("probe.y"))
        torch.testing.assert_close(hooked(data.clone())["probe", "y"], set_again.probabilities(hidden))
        with pytest.raises(MissingKeyError, match=r"no control is named 'probe\.z"):
            one.push(hooked.controls, "probe.z")


def test_a_pushed_probe_of_another_shape_is_refused_as_a_whole() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    blank = LinearProbe(weight=torch.zeros(2, 8), bias=torch.zeros(2), path="1")
    with hooked_with(blank, net) as hooked:
        other = LinearProbe(weight=torch.zeros(3, 8), bias=torch.zeros(3), path="1", kind="ridge")
        with pytest.raises(InputError, match="keeps its shape"):
            hooked.controls.update_(other.controls("probe.y"))
        assert int(hooked.controls["probe.y.kind"]) == 0


def test_a_readout_far_from_zero_keeps_its_digits() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[0].bias.fill_(1e4)
    x = torch.randn(2000, 4)
    data = TensorDict({"input": x, "y": (x[:, 0] > 0).long(), "row": torch.arange(2000)}, [2000])
    blank = LinearProbe(weight=torch.zeros(2, 4), bias=torch.zeros(2), path="1")
    one = OnlineProbe(features=("cache", "1"), label="y", split=GroupSplit("row"))
    with hooked_with(blank, net) as hooked:
        one.update(hooked(data.clone()))
        one.push(hooked.controls, "probe.y")
        for policy in (hooked, torch.compile(hooked, backend="eager", fullgraph=True)):
            read = policy(data.clone())["probe", "y"].argmax(-1)
            assert (read == data["y"]).float().mean() > 0.97


@pytest.mark.parametrize("bad", ["LDA", "Ridge", "logistic", "", None, "values"])
def test_a_kind_is_lda_or_ridge(bad: object) -> None:
    with pytest.raises(InputError, match=r"'lda' (or|\|) 'ridge'"):
        LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), kind=bad)
    for sums in (ClassStatistics(features=2, classes=2), TargetStatistics(features=2, targets=1)):
        with pytest.raises(InputError, match=r"'lda' (or|\|) 'ridge'"):
            sums.solve(kind=bad)


def test_probes_of_other_concepts_are_saved_and_loaded(tmp_path) -> None:
    for concept, kind in (("labels", "lda"), ("values", "ridge")):
        probe = LinearProbe(
            weight=torch.randn(2, 3), bias=torch.randn(2).double(), kind=kind, concept=concept, path="1"
        )
        again = LinearProbe.load(probe.save(tmp_path / concept))
        x = torch.randn(5, 3) + 1e4
        assert (again.concept, again.kind, again.bias.dtype) == (concept, kind, torch.float64)
        assert torch.equal(again.predict(x), probe.predict(x))
        with pytest.raises(InputError, match="accuracy is of classes"):
            again.accuracy(x, torch.zeros(5))
    with pytest.raises(InputError, match="no probabilities"):
        again.probabilities(x)
    with pytest.raises(InputError, match="of the kind 'ridge'"):
        LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), concept="values")
    with pytest.raises(InputError, match=r"a weight \(classes, features\)"):
        LinearProbe(weight=torch.eye(2), bias=torch.zeros(3))


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    "groupings", [("a", "b"), ("a", ["a", "b"]), ("a", "b", "c"), (["a", "b"], ["b", "a"])], ids=str
)
def test_groupings_of_equal_numbers_are_independent(groupings: tuple) -> None:
    numbers = torch.arange(300)
    data = TensorDict({"a": numbers, "b": numbers, "c": numbers}, [300])
    masks = [GroupSplit(*groupings, held_out=0.25, seed=seed)(data) for seed in range(60)]
    train, held = (torch.stack(part).double().mean().item() for part in zip(*masks, strict=True))
    assert held == pytest.approx(0.25 ** len(groupings), abs=0.012)
    assert train == pytest.approx(0.75 ** len(groupings), abs=0.02)


def test_a_split_is_the_same_wherever_and_however_rows_come() -> None:
    numbers = torch.arange(120).reshape(4, 30)
    data = TensorDict({"a": numbers, "b": numbers.int()[..., None], "c": numbers % 2 == 0}, [4, 30])
    split = GroupSplit("a", ["b", "c"], seed=3)
    train, held = split(data)
    flat = split(data.reshape(-1))
    assert torch.equal(flat[0].reshape(4, 30), train)
    assert torch.equal(split(data[2, 5])[1], held[2, 5])
    # Numbers that every process and version must agree on, or a probe would be scored on what it learned from.
    assert GroupSplit("episode").groups(TensorDict({"episode": torch.arange(3)}, [3]))[0].tolist() == KNOWN
    for wrong in (numbers.float(), numbers.to(torch.complex64)):
        with pytest.raises(InputError, match="groups are integers"):
            GroupSplit("a")(TensorDict({"a": wrong}, [4, 30]))


KNOWN = [5532484405313348364, 613890661175776248, 29388428844749509]
