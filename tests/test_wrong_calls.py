"""Every argument of what is beside the methods, given something else than it takes: it works, or is told in words.

Methods themselves are in ``test_wrong_arguments.py``. Here are probes, splits, hooks, checks, estimators, metrics,
statistics, runs, and the calls of a hooked policy.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import Compose, LinearProbe, Saliency
from tdhook_rl import metrics as of_attributions
from tdhook_rl.attribution import DimsConfig, windows
from tdhook_rl.errors import ArgumentError
from tdhook_rl.latent import SteeringVector, cosines, principal_directions, probing
from tdhook_rl.latent import dimension_estimation as dimensions
from tdhook_rl.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator
from tdhook_rl.replay import (
    analyze,
    by_feature,
    episodes,
    in_order,
    load_results,
    returns,
    rows_where,
    smallest_margins,
)
from tdhook_rl.rollout import (
    AnnotatedMetrics,
    AnnotateHook,
    GroupSplit,
    Guarded,
    NetworkDiagnostics,
    OnlineProbe,
    check,
    set_controls,
    summarise,
)
from tests.test_wrong_arguments import WRONG, works_or_is_told

X, F = torch.randn(3, 4), torch.randn(6, 4)
ROWS = TensorDict(
    {
        "input": F, "f": F, "data": F, "data_a": F, "data_b": F, "y": torch.tensor([0, 1, 0, 1, 1, 0]),
        "row": torch.arange(6), "attr": {"input": F}, "step_type": torch.zeros(6, 1), "labels": torch.zeros(6).long(),
    },
    [6],
)  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def hooked(*methods: Any) -> Any:
    return Compose(*(methods or (Saliency(),))).prepare(net(), return_context=False)


def rows() -> TensorDict:
    return ROWS.clone()


def buffer() -> ReplayBuffer:
    found = ReplayBuffer(storage=LazyTensorStorage(6))
    found.extend(ROWS.select("input"))
    return found


def analysed(**given: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return analyze(**{"folder": folder, **given})


analysed.__signature__ = inspect.signature(analyze)  # type: ignore[attr-defined]


class Running:
    """What has the name of a collector's method, and no more."""

    def shutdown(self) -> None:
        pass


#: Functions of the user's, whose own errors stay what they are.
OWN = {
    ("NetworkDiagnostics", "loss", "module"),
    ("NetworkDiagnostics", "loss", "class"),
    ("NetworkDiagnostics", "loss", "function"),
    ("OnlineProbe", "label", "module"),
    ("from_contrast", "where", "module"),
    ("from_contrast", "groups", "module"),
    ("cascading_randomisation", "initialise", "module"),
    ("analyze", "where", "module"),
    ("rows_where", "where", "module"),
    ("by_feature", "where", "module"),
    ("by_feature", "statistic", "module"),
}


def metrics(predicted: Any, labels: Any) -> dict[str, float]:
    return {"n": 1.0}


def fitted(estimator: Any) -> Any:
    return estimator.fit(F, y=torch.tensor([0, 1, 0, 1, 1, 0]))


def fitted_pair(estimator: Any) -> Any:
    return estimator.fit(F, F, y=torch.tensor([0, 1, 0, 1, 1, 0]))


def read(module: Any) -> Any:
    return module(TensorDict({"data": F, "data_a": F, "data_b": F}))


def probe() -> OnlineProbe:
    return OnlineProbe(features="f", label="y", split=GroupSplit("row"))


#: What is called, its other arguments (made anew), and what is done with the result.
CALLS: dict[str, tuple[Any, Callable[[], dict[str, Any]], Callable[[Any], Any] | None]] = {
    "OnlineProbe": (OnlineProbe, lambda: {"features": "f", "label": "y", "split": GroupSplit("row")},
                    lambda made: made.update(rows())),
    "OnlineProbe.update": (probe().update, lambda: {"data": rows()}, None),
    "GroupSplit": (GroupSplit, lambda: {}, None),
    "GroupSplit()": (GroupSplit("row"), lambda: {"data": rows()}, None),
    "Guarded": (Guarded, lambda: {"collector": Running()}, None),
    "AnnotatedMetrics": (AnnotatedMetrics, lambda: {"policy": hooked()}, lambda made: made(rows())),
    "AnnotatedMetrics()": (AnnotatedMetrics(hooked()), lambda: {"data": rows()}, None),
    "AnnotateHook": (AnnotateHook, lambda: {"policy": hooked()}, lambda made: made.annotate_batch(rows())),
    "annotate_batch": (AnnotateHook(hooked()).annotate_batch, lambda: {"batch": rows()}, None),
    "NetworkDiagnostics": (NetworkDiagnostics, lambda: {"policy": net(), "sites": ["1"]},
                           lambda made: made.update(rows())),
    "NetworkDiagnostics.update": (NetworkDiagnostics(net(), sites=["1"]).update, lambda: {"data": rows()}, None),
    "summarise": (summarise, lambda: {"data": rows(), "result_keys": [("attr", "input")]}, None),
    "set_controls": (set_controls, lambda: {"collector": Running(), "values": {}}, None),
    "check": (check, lambda: {"policy": hooked(), "env": object(), "steps": 2}, None),
    "analyze": (analysed, lambda: {"hooked": hooked(), "buffer": buffer()}, None),
    "returns": (returns, lambda: {"buffer": episode()}, None),
    "episodes": (episodes, lambda: {"buffer": episode()}, None),
    "rows_where": (rows_where, lambda: {"buffer": episode(), "where": lambda one: torch.ones(len(one)) > 0}, None),
    "smallest_margins": (smallest_margins, lambda: {"buffer": episode()}, None),
    "by_feature": (by_feature, lambda: {"results": TensorDict({"attr": {"f": F}}, len(F)), "buffer": episode()}, None),
    "in_order": (in_order, lambda: {"buffer": buffer()}, list),
    "load_results": (load_results, lambda: {"folder": "nowhere"}, None),
    "ProbeManager": (probing.ProbeManager, lambda: {"estimator_class": probing.LinearEstimator,
                     "estimator_kwargs": {"epochs": 1, "num_classes": 2}, "compute_metrics": metrics}, None),
    "BilinearProbeManager": (probing.BilinearProbeManager, lambda: {"pairs": [("0", "1")],
                             "estimator_class": probing.LinearEstimator, "estimator_kwargs": {},
                             "compute_metrics": metrics}, None),
    "LinearEstimator": (probing.LinearEstimator, lambda: {"epochs": 1, "num_classes": 2}, fitted),
    "LinearEstimator.fit": (probing.LinearEstimator(epochs=1, num_classes=2).fit, lambda: {"y": ROWS["y"]}, None),
    "BilinearEstimator": (probing.BilinearEstimator, lambda: {"epochs": 1, "num_classes": 2}, fitted_pair),
    "LowRankBilinearEstimator": (probing.LowRankBilinearEstimator, lambda: {"epochs": 1, "num_classes": 2},
                                 fitted_pair),
    "MeanDifferenceClassifier": (probing.MeanDifferenceClassifier, lambda: {}, fitted),
    "LinearProbe": (LinearProbe, lambda: {"weight": torch.zeros(2, 8), "bias": torch.zeros(2), "path": "1"}, None),
    "ClassStatistics": (probing.ClassStatistics, lambda: {"classes": 2, "features": 4}, None),
    "TargetStatistics": (probing.TargetStatistics, lambda: {"targets": 2, "features": 4}, None),
    "SteeringVector": (SteeringVector, lambda: {"vector": torch.zeros(8), "path": "1"}, None),
    "from_pairs": (SteeringVector.from_pairs, lambda: {"policy": net(), "path": "1", "positive": rows(),
                                                       "negative": rows()}, None),
    "from_contrast": (SteeringVector.from_contrast, lambda: {"policy": net(), "path": "1", "data": rows(),
                                                             "where": "y"}, None),
    "from_probe": (SteeringVector.from_probe, lambda: {
        "policy": net(), "probe": LinearProbe(weight=torch.eye(2, 8), bias=torch.zeros(2), path="1")}, None),
    "from_tensor": (SteeringVector.from_tensor, lambda: {"policy": net(), "path": "1", "vector": torch.ones(8)}, None),
    "from_addition": (SteeringVector.from_addition, lambda: {
        "policy": net(), "path": "1", "data": TensorDict({"steer": {"1": torch.ones(2, 8)}}, 2)}, None),
    "check of a vector": (SteeringVector(vector=torch.ones(8), path="1").check, lambda: {"policy": net()}, None),
    "shuffled_like": (SteeringVector(vector=torch.ones(2), path="1", shuffled=torch.ones(3, 2)).shuffled_like,
                      lambda: {}, None),
    "random_like": (SteeringVector(vector=torch.ones(2), path="1").random_like, lambda: {"count": 2}, None),
    "principal_directions": (principal_directions, lambda: {"policy": net(), "path": "1", "positive": rows(),
                                                            "negative": ROWS[torch.arange(6).roll(1)]}, None),
    "cosines": (cosines, lambda: {"vectors": {"a": SteeringVector(vector=torch.ones(8), path="1")}}, None),
    "DimsConfig": (DimsConfig, lambda: {}, None),
    "windows": (windows, lambda: {"shape": (4, 4), "size": (2, 2)}, None),
    "CkaEstimator": (CkaEstimator, lambda: {}, read),
    "InformationImbalanceEstimator": (InformationImbalanceEstimator, lambda: {}, read),
    **{name: (getattr(dimensions, name), lambda: {}, read) for name in dimensions.__all__},
    "InfidelityMetric": (of_attributions.InfidelityMetric, lambda: {}, lambda made: made(hooked(), rows())),
    "InfidelityMetric()": (of_attributions.InfidelityMetric(), lambda: {"hooked": hooked(), "data": rows()}, None),
    "SensitivityMetric": (of_attributions.SensitivityMetric, lambda: {}, lambda made: made(hooked(), rows())),
    "SensitivityMetric()": (of_attributions.SensitivityMetric(), lambda: {"hooked": hooked(), "data": rows()}, None),
    "deletion_insertion": (of_attributions.deletion_insertion,
                           lambda: {"hooked": hooked(), "data": rows(), "baseline": 0.0, "n_steps": 2}, None),
    "completeness_gap": (of_attributions.completeness_gap,
                         lambda: {"hooked": hooked(), "data": rows(), "baseline": 0.0}, None),
    "cascading_randomisation": (of_attributions.cascading_randomisation,
                                lambda: {"method": Saliency(), "module": net(), "data": rows()}, None),
    "pointing_game": (of_attributions.pointing_game, lambda: {"attribution": F, "mask": F > 0}, None),
    "relevance_mass": (of_attributions.relevance_mass, lambda: {"attribution": F, "mask": F > 0}, None),
    "dormant_units": (of_attributions.dormant_units, lambda: {"activations": F}, None),
    "effective_rank": (of_attributions.effective_rank, lambda: {"activations": F}, None),
    "entropy_rank": (of_attributions.entropy_rank, lambda: {"activations": F}, None),
    "action_churn": (of_attributions.action_churn, lambda: {"before": F[:, 0], "after": F[:, 1]}, None),
    "annotate": (hooked().annotate, lambda: {"data": rows()}, None),
    "run": (hooked().run, lambda: {"data": rows()}, lambda run: ended(run)),
}  # fmt: skip


def episode() -> TensorDict:
    ends = torch.arange(len(F))[:, None] % 2 == 1
    return TensorDict({"logits": F, "next": {"reward": F[:, :1], "done": ends}}, batch_size=len(F))


def ended(run: Any) -> None:
    with run:
        run.save("1")


def cases() -> list[Any]:
    return [
        pytest.param(name, argument, id=f"{name}-{argument}")
        for name, (called, _, _) in CALLS.items()
        for argument in parameters(called)
    ]


def parameters(called: Any) -> list[str]:
    found = inspect.signature(called).parameters.values()
    return [one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


@pytest.mark.parametrize(("name", "argument"), cases())
def test_every_argument_of_every_call(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what is written under a wrong name goes there
    called, others, after = CALLS[name]
    for kind, wrong in WRONG.items():
        if (name, argument, kind) in OWN:
            continue

        def run(wrong: Any = wrong) -> None:
            made = called(**{**others(), argument: wrong})
            if after is not None:
                after(made)

        works_or_is_told(run)


@pytest.mark.parametrize(
    "verb", ["get", "save", "set", "stop", "get_input", "save_grad", "set_input", "set_grad_output"]
)
def test_every_request_of_a_run(verb: str) -> None:
    policy = hooked()
    signature = inspect.signature(getattr(policy.run(rows()), verb.partition("_")[0])).parameters
    for argument in ({"stop": ["key", "relative"]}).get(verb, [*signature]):
        if "_" in verb and argument in ("direction", "options"):
            continue
        for wrong in WRONG.values():

            def run(argument: str = argument, wrong: Any = wrong) -> None:
                given = {"key": "1", **({"value": torch.zeros(6, 8)} if verb.startswith("set") else {})}
                with policy.run(rows(), grad_enabled=True) as body:
                    getattr(body, verb)(**{**given, argument: wrong})

            works_or_is_told(run)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: OnlineProbe(features=nn.Tanh(), label="y"), r"OnlineProbe\(features=\.\.\.\) takes a key"),
        (lambda: probe().update({"f": F}), r"update\(data=\.\.\.\) takes TensorDictBase, got"),
        (lambda: GroupSplit("row", held="a"), "has no argument 'held'; nearest: 'held_out'"),
        (lambda: analyze(hooked(), 3, "folder"), r"analyze\(buffer=\.\.\.\) takes ReplayBuffer \| .*, got 3"),
        (lambda: check(hooked(), object(), [1]), r"check\(collector_kwargs=\.\.\.\) takes Mapping"),
        (lambda: AnnotatedMetrics(hooked(), on_mismatch="off"), r"takes 'warn' \| .*, got 'off'"),
        (lambda: hooked().run(rows(), grad_enabled="yes"), r"grad_enabled=\.\.\.\) takes bool"),
        (lambda: hooked().run(rows(), traget=None), "no argument 'traget'; nearest: 'target'"),
        (lambda: of_attributions.pointing_game("a", F > 0), r"pointing_game\(attribution=\.\.\.\) takes Tensor"),
        (lambda: of_attributions.effective_rank([[1.0], [1.0, 2.0]]), "makes none of"),
        # What is inherited says which class it is of.
        (lambda: dimensions.LocalKnnDimensionEstimator(in_key=7), r"LocalKnnDimensionEstimator\(in_key=\.\.\.\) takes"),
        (lambda: of_attributions.SensitivityMetric()(hooked(), 7), r"SensitivityMetric\.__call__\(data=\.\.\.\) takes"),
    ],
)
def test_what_is_said(given: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        given()


def test_arrays_are_tensors() -> None:
    expected = of_attributions.pointing_game(F, F > 0)
    for attribution, mask in ((F.numpy(), (F > 0).numpy()), (F.tolist(), (F > 0).tolist())):
        assert torch.equal(of_attributions.pointing_game(attribution, mask), expected)
