"""Probes of pairs of sites, and the torch estimators that managers fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Compose
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing import (
    BilinearEstimator,
    BilinearProbeManager,
    LinearEstimator,
    LowRankBilinearEstimator,
    MeanDifferenceClassifier,
    ProbeManager,
)
from tests.managed_probes import accuracy, probing


def pairs(**options: Any) -> BilinearProbeManager:
    return BilinearProbeManager(
        [("first", "second")], BilinearEstimator, {"num_classes": 2, "lr": 0.1, "epochs": 30}, accuracy, **options
    )


class Two(nn.Module):
    """Two encoders of two halves of the input, of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x[..., :2]), self.second(x[..., 2:])], -1)


def products(*batch: int, step_type: str = "fit") -> TensorDict:
    x = torch.randn(*batch, 4)
    labels = (x[..., 0] * x[..., 2] > 0).long()
    return TensorDict({"input": x, "labels": labels, "step_type": step_type}, batch_size=batch)


def test_pairs_find_what_no_site_knows_alone() -> None:
    net, manager = Two(), pairs()
    alone = ProbeManager(LinearEstimator, {"num_classes": 2, "lr": 0.1, "epochs": 30}, accuracy)
    method = Compose(probing(manager, manager.key_pattern), probing(alone, "(first|second)$"))
    with torch.inference_mode(), method.prepare(net) as hooked:
        manager.before_all()
        hooked(products(20, 40))
        hooked(products(300, step_type="predict"))
        manager.after_all()
    assert list(manager.estimators) == ["first_second_fwd"]
    assert manager.predict_metrics["first_second_fwd"]["accuracy"] > 0.9
    assert alone.predict_metrics["first_fwd"]["accuracy"] < 0.65
    assert alone.predict_metrics["second_fwd"]["accuracy"] < 0.65


def test_pairs_say_what_is_missing() -> None:
    manager, data = pairs(), products(50)
    with probing(manager, manager.key_pattern).prepare(Two()) as hooked:
        with pytest.raises(InputError, match=r"call manager\.before_all\(\)"):
            hooked(data)
        with pytest.raises(InputError, match=r"after_all\(\) without before_all"):
            manager.after_all()
    with probing(manager, "first").prepare(Two()) as hooked:
        manager.before_all()
        hooked(data)
        with pytest.raises(InputError, match="ran again while the pair"):
            hooked(data)
        with pytest.raises(InputError, match=r"1 pair\(s\) still wait, .*'first' ran"):
            manager.after_all()
    with pytest.raises(InputError, match=r"'third' belongs to no pair; nearest: 'first'"):
        manager.probe_factory("third", "fwd")
    with pytest.raises(InputError, match="pairs is a list"):
        BilinearProbeManager([], BilinearEstimator, {}, accuracy)


# ---------------------------------------------------------------------- torch estimators


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["linear", "mean", "bilinear", "low_rank", "regression"])
def test_estimators_learn_and_disturb_nothing(kind: str, mode: Callable[[], Any]) -> None:
    options = {"lr": 0.1, "epochs": 40}
    make = {
        "linear": lambda: LinearEstimator(num_classes=3, **options),
        "mean": MeanDifferenceClassifier,
        "bilinear": lambda: BilinearEstimator(num_classes=2, **options),
        "low_rank": lambda: LowRankBilinearEstimator(3, 4, rank=1, num_classes=2, **options),
        "regression": lambda: LinearEstimator(d_latent=3, **options),
    }[kind]
    with mode():
        a, b = torch.randn(600, 3), torch.randn(600, 4)
        product = (a[:, 0] * b[:, 1] > 0).long()
        y = {
            "linear": torch.stack([a[:, 0], a[:, 1], torch.zeros(600)], -1).argmax(-1),
            "mean": (a[:, 0] > 0.2).long(),
            "bilinear": product,
            "low_rank": product,
            "regression": 2 * a[:, 0] - a[:, 2] + 1,
        }[kind]
        inputs = (a, b) if kind in ("bilinear", "low_rank") else (a,)
        before = torch.get_rng_state()
        first, second = (make().fit(*(x[:400] for x in inputs), y=y[:400]) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        predictions = first.predict(*(x[400:] for x in inputs))
        if kind == "regression":
            torch.testing.assert_close(predictions, y[400:], rtol=0, atol=0.02)
        else:
            assert (predictions == y[400:]).float().mean() > 0.9
            probabilities = first.predict_proba(*inputs)
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(600))
            assert torch.equal(probabilities.argmax(-1), first.predict(*inputs))
    assert not predictions.requires_grad
    for name, weight in first.weights.items():
        assert not weight.requires_grad
        assert torch.equal(weight, second.weights[name])


def test_the_seed_is_the_callers_or_that_of_torch() -> None:
    a, b, y = torch.randn(50, 3), torch.randn(50, 4), torch.randn(50)

    def fitted(seed: int | None = None) -> torch.Tensor:
        return LowRankBilinearEstimator(epochs=1, seed=seed).fit(a, b, y=y).weights["left"]

    torch.manual_seed(3)
    assert torch.equal(fitted(), fitted(3))
    torch.manual_seed(4)
    assert not torch.equal(fitted(), fitted(3))


def test_mean_difference_keeps_its_classes_under_scaling() -> None:
    x = torch.randn(100, 5) * 3
    y = (x[:, 1] + 0.5 * torch.randn(100) > 1).long()
    unit, raw = MeanDifferenceClassifier().fit(x, y=y), MeanDifferenceClassifier(normalize=False).fit(x, y=y)
    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    torch.testing.assert_close(raw.coef_, difference)
    torch.testing.assert_close(unit.coef_, difference / difference.norm())
    torch.testing.assert_close(raw.intercept_, -difference @ (x[y == 1].mean(0) + x[y == 0].mean(0)) / 2)
    assert torch.equal(unit.predict(x), raw.predict(x))


def test_estimators_say_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.long)
    fitted = LinearEstimator(num_classes=2, epochs=1, verbose=True, bias=False).fit(x, y=y)
    assert "epoch 0, loss 0.69" in capsys.readouterr().out
    assert set(fitted.weights) == {"weight"}
    for call, message in (
        (lambda: LinearEstimator(num_classes=1), "at least 2"),
        (lambda: LinearEstimator(epochs=0), "are positive"),
        (lambda: LowRankBilinearEstimator(rank=0), "rank of at least 1"),
        (lambda: LinearEstimator(num_classes=2).predict(x), "before it was fitted"),
        (lambda: LinearEstimator(d_latent=4).fit(x, y=y), r"features \[4\], got \[\(10, 3\)\]"),
        (lambda: BilinearEstimator().fit(x, y=y), r"takes 2 input\(s\)"),
        (lambda: LinearEstimator().fit(x, y=y[:9]), "do not fit inputs"),
        (lambda: LinearEstimator(num_classes=2).fit(x, y=y + 2), "labels go from 2 to 2"),
        (lambda: LinearEstimator(num_classes=2).fit(x, y=y + 0.5), "class numbers"),
        (lambda: MeanDifferenceClassifier().fit(x, y=y), r"\[10, 0\] rows"),
        (lambda: fitted.predict(torch.randn(10, 2)), r"features \[3\], got \[\(10, 2\)\]"),
        (lambda: LinearEstimator(epochs=1).fit(x, y=y).predict_proba(x), "no class probabilities"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize(("bad", "dtype"), [(torch.nan, torch.float32), (-torch.inf, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "made",
    [
        lambda: LinearEstimator(epochs=2), lambda: LinearEstimator(num_classes=2, epochs=2), MeanDifferenceClassifier,
        lambda: BilinearEstimator(epochs=2), lambda: LowRankBilinearEstimator(num_classes=2, epochs=2),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(made: Callable[[], Any], dtype: torch.dtype, bad: float) -> None:
    """One of them would make all weights NaN, and all rows of the first class."""
    inputs = [torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1)]
    estimator = made()
    inputs = inputs[: len(estimator.widths)]
    labels = (inputs[0][:, 0] > 0).to(dtype)
    for place in range(len(inputs)):
        spoilt = [one.clone() for one in inputs]
        spoilt[place][7, 1] = bad
        with pytest.raises(InputError, match=r"inputs hold NaN or infinite values in 1 of 30 rows \(row 7 first\)"):
            estimator.fit(*spoilt, y=labels)
        with pytest.raises(InputError, match="inputs hold NaN"):
            estimator.fit(*inputs, y=labels).predict(*spoilt)
    labels[3] = bad
    with pytest.raises(InputError, match=r"(labels|values) hold NaN or infinite values in 1 of 30 rows \(row 3"):
        estimator.fit(*inputs, y=labels)


@pytest.mark.parametrize(("kind", "options"), [(LinearEstimator, {"epochs": 3, "seed": 0}), (Ridge, {})])
def test_rows_without_a_label_are_left_out(kind: Any, options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    seen = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = seen[:, 0].clone()
    labels[::7], labels[1] = torch.nan, torch.inf
    found = []
    for rows in (slice(None), labels.isfinite()):
        manager = ProbeManager(kind, options, lambda predictions, labels: {"all": [*map(float, predictions)]})
        data = TensorDict({"input": seen[rows], "labels": labels[rows], "step_type": "fit"}, [len(labels[rows])])
        with probing(manager, "1").prepare(net) as hooked:
            hooked(data)
            hooked(data.set("step_type", "predict"))
        found.append((manager.fit_metrics, manager.predict_metrics))
    assert found[0] == found[1]
