"""Rows of the oracle table: probes, intrinsic dimension and similarity of representations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import Tensor

from benchmarks.comparison import Case, row
from benchmarks.oracle_rows_attribution import inputs
from tdhook_rl.latent.dimension_estimation import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdhook_rl.latent.probing import ClassStatistics, MeanDifferenceClassifier, ProbeManager, Probing
from tdhook_rl.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator
from tests.oracles import ridge
from tests.policies import FEATURES, mlp
from tests.test_dimension_estimation import neighbourhoods, plane
from tests.test_representation_similarity import brute_imbalance, gram, hsic, pair


def labelled() -> tuple[Tensor, Tensor]:
    x = inputs(200)
    return x, (x[:, 0] + 0.5 * torch.randn(200, dtype=torch.float64) > 0).long()


@row("Probing, ProbeManager.fit_metrics and predict_metrics", "scikit-learn on activations by hand")
def probing() -> Case:
    net = mlp().double()
    x, y = labelled()
    hidden = net[:2](x).detach().numpy()
    by_hand = LogisticRegression().fit(hidden[:100], y[:100].numpy())
    steps = {"fit": slice(0, 100), "predict": slice(100, 200)}
    keys = ["labels", "step_type"]

    def scores(manager: Any, method: Callable[..., Any]) -> Tensor:
        with method("1", manager.probe_factory, additional_keys=keys).prepare(copy.deepcopy(net)) as hooked:
            for step, rows in steps.items():
                hooked(TensorDict({"input": x[rows], "labels": y[rows], "step_type": step}, batch_size=100))
        both = manager.fit_metrics["1_fwd"], manager.predict_metrics["1_fwd"]
        return torch.tensor([one["accuracy"] for one in both], dtype=torch.float64)

    def accuracy(predictions: Any, y: Any) -> dict[str, float]:
        return {"accuracy": float((np.asarray(predictions) == np.asarray(y)).mean())}

    def tdhooks() -> Tensor:
        from tdhook.latent import probing

        return scores(probing.ProbeManager(LogisticRegression, {}, accuracy), probing.Probing)

    expected = [by_hand.score(hidden[rows], y[rows].numpy()) for rows in steps.values()]
    return Case(expected, lambda: scores(ProbeManager(LogisticRegression, {}, accuracy), Probing), None, tdhooks)


@row("OnlineProbe, ridge on streamed and merged statistics", "numpy.linalg.lstsq; the probe is float32")
def streamed() -> Case:
    x, y = labelled()
    weight, bias = ridge(x.numpy(), y.numpy(), 2, 3.0)

    def ours() -> Tensor:
        parts = []
        for rows in (slice(0, 150), slice(150, 200)):
            parts.append(ClassStatistics(features=FEATURES, classes=2))
            for start in range(rows.start, rows.stop, 25):
                parts[-1].add(x[start : start + 25], y[start : start + 25])
        probe = (parts[0] + parts[1]).solve(kind="ridge", penalty=3.0)
        return torch.cat([probe.weight, probe.bias[:, None]], 1)

    return Case(np.hstack([weight, bias[:, None]]), ours)


@row("MeanDifferenceClassifier", "difference of means in numpy")
def mean_difference() -> Case:
    x, y = labelled()
    difference = x[y == 1].numpy().mean(0) - x[y == 0].numpy().mean(0)

    def tdhooks() -> Tensor:
        from tdhook.latent.probing import MeanDifferenceClassifier as Tdhook

        found = Tdhook(normalize=True)
        found.fit(x, y)
        return found.coef_.reshape(-1)

    expected = difference / np.linalg.norm(difference)
    return Case(expected, lambda: MeanDifferenceClassifier().fit(x, y=y).coef_, None, tdhooks)


def dimension_row(name: str, ours: Any, in_tdhook: dict[str, Any] | str, by_hand: Callable[[Tensor], Any]) -> None:
    kind = type(ours).__name__

    @row(f"{kind}{name}", "loops in numpy")
    def case() -> Case:
        points = plane(50, 3)

        def tdhooks() -> Tensor:
            from tdhook.latent import dimension_estimation

            return getattr(dimension_estimation, kind)(**in_tdhook)(TensorDict({"data": points}))["dimension"]

        theirs = in_tdhook if isinstance(in_tdhook, str) else tdhooks
        return Case(by_hand(points), lambda: ours(TensorDict({"data": points}))["dimension"], None, theirs)


def two_nn(kept: int) -> Callable[[Tensor], float]:
    def fit(points: Tensor) -> float:
        ratios = np.log(sorted(d[1] / d[0] for d, _ in neighbourhoods(points.numpy()))[:kept])
        below = -np.log(1 - (np.arange(kept) + 1) / 50)
        return float(np.linalg.lstsq(ratios[:, None], below, rcond=None)[0][0])

    return fit


def local_knn(points: Tensor) -> list[float]:
    return [9 / sum(np.log(d[10] / d[j]) for j in range(10)) for d, _ in neighbourhoods(points.numpy())]


def local_pca(points: Tensor) -> list[int]:
    found = []
    for i, (_, order) in enumerate(neighbourhoods(points.numpy())):
        values = np.linalg.eigvalsh(np.cov(points.numpy()[[i, *order[:9]]].T))[::-1][:9]
        found.append(1 + max(range(len(values) - 1), key=lambda j: values[j] / values[j + 1]))
    return found


def ca_pca(points: Tensor) -> list[int]:
    found = []
    for apart, order in neighbourhoods(points.numpy()):
        values = np.linalg.eigvalsh(np.cov(points.numpy()[order[:9]].T))[::-1] / apart[9] ** 2
        scores = {}
        for d in range(1, 9):
            tail, share = sum(values[d:]), (3 * d + 4) / (2 * d * (d + 1))
            scores[d] = np.sqrt(sum((v + share * tail - 1 / (d + 2)) ** 2 for v in values[:d])) + 2 * tail
        found.append(min(scores, key=scores.__getitem__))
    return found


dimension_row("", TwoNnDimensionEstimator(), "keeps all ratios", two_nn(45))
dimension_row(", all ratios kept", TwoNnDimensionEstimator(discard=0.0), {}, two_nn(49))
dimension_row("", LocalKnnDimensionEstimator(k=11), "another estimator", local_knn)
dimension_row("", LocalPcaDimensionEstimator(k=9), {"k": 9}, local_pca)
dimension_row("", CaPcaDimensionEstimator(k=9), "another radius", ca_pca)


def cka_row(kernel: str, debiased: bool) -> None:
    @row(f"CkaEstimator, {kernel}{', debiased' if debiased else ''}", "explicit Gram matrices")
    def case() -> Case:
        a, b = pair()
        k, m = gram(a.numpy(), kernel), gram(b.numpy(), kernel)
        data = TensorDict({"data_a": a, "data_b": b})

        def tdhooks() -> Tensor:
            from tdhook.latent.representation_similarity import CkaEstimator as Tdhook

            return Tdhook(kernel=kernel)(data.clone())["cka"]

        return Case(
            hsic(k, m, debiased) / np.sqrt(hsic(k, k, debiased) * hsic(m, m, debiased)),
            lambda: CkaEstimator(kernel=kernel, debiased=debiased)(data.clone())["cka"],
            None,
            None if debiased else tdhooks,
        )


cka_row("linear", False)
cka_row("linear", True)
cka_row("rbf", False)


@row("InformationImbalanceEstimator", "counting")
def information_imbalance() -> Case:
    a, b = pair(25, 3, 2)
    keys = ["information_imbalance_a_to_b", "information_imbalance_b_to_a"]

    def both(estimator: Any) -> Tensor:
        found = estimator(TensorDict({"data_a": a, "data_b": b}))
        return torch.stack([found[key] for key in estimator.out_keys if key in keys])

    def tdhooks() -> Tensor:
        from tdhook.latent.representation_similarity import InformationImbalanceEstimator as Tdhook

        return both(Tdhook(out_key_a_to_b=keys[0], out_key_b_to_a=keys[1]))

    x, y = a.numpy(), b.numpy()
    expected = [brute_imbalance(x, y, 2), brute_imbalance(y, x, 2)]
    return Case(expected, lambda: both(InformationImbalanceEstimator()), None, tdhooks)
