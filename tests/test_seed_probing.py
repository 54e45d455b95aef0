"""Probing with managers: the seed page's Workflow 2, batch shapes, rollouts, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs import GymEnv
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, Saliency, SteeringVectors
from tdhook_rl.errors import InputError, MissingKeyError, PreparationError, SiteError
from tdhook_rl.latent.probing import (
    LinearEstimator,
    ProbeManager,
    Probing,
)
from tests.managed_probes import KEYS, SITE, accuracy, probing
from tests.policies import FEATURES, HIDDEN, categorical, mlp

VOCABULARY, WIDTH, LENGTH = 11, 8, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x.mT).mT
        return x + self.mlp(x)


class Language(nn.Module):
    """Paths as in GPT-2: ``transformer.h.<block>.mlp``."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer.h = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(input_ids)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(x)


def sentences(rows: int, seed: int) -> TensorDict:
    tokens = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return TensorDict({"input_ids": tokens, "labels": (tokens[:, 0] > 4).long()}, batch_size=rows)


def rows(*batch: int, step_type: str = "fit") -> TensorDict:
    x = torch.randn(*batch, FEATURES)
    return TensorDict({"observation": x, "labels": (x[..., 0] > 0).long(), "step_type": step_type}, batch_size=batch)


def captured(net: nn.Module, sites: list[str], *args: torch.Tensor) -> list[np.ndarray]:
    """The outputs of modules, read by hooks of our own."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        net.get_submodule(site).register_forward_hook(lambda m, a, out, site=site: found.update({site: out}))
        for site in sites
    ]
    with torch.no_grad():
        net(*args)
    for handle in handles:
        handle.remove()
    return [found[site].flatten(1).numpy() for site in sites]


class Recorder:
    """A probe of the user's own: keeps what it is given."""

    def __init__(self, key: str = "", direction: str = "") -> None:
        self.seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def step(self, activation: torch.Tensor, **additional: Any) -> None:
        self.seen.append((activation, additional))


# ---------------------------------------------------------------------- the seed page's Workflow 2


@pytest.mark.parametrize("batched", [True, False])
def test_the_workflow_of_the_seed_page(batched: bool) -> None:
    model = Language()
    train_td, test_td = sentences(120, 0), sentences(60, 1)
    plain = model(test_td["input_ids"])
    state, hooks = copy.deepcopy(model.state_dict()), [len(child._forward_hooks) for child in model.modules()]
    train_td["step_type"], test_td["step_type"] = "fit", "predict"
    if not batched:
        train_td.batch_size, test_td.batch_size = [], []

    compute_metrics = accuracy
    manager = ProbeManager(LogisticRegression, {"max_iter": 500}, compute_metrics)
    with Probing(
        "transformer.h.(0|1).mlp$",
        manager.probe_factory,
        additional_keys=["labels", "step_type"],
    ).prepare(model, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
        hooked(train_td)  # step_type="fit"
        hooked(test_td)  # step_type="predict"

    sites = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert list(manager.fit_metrics) == list(manager.predict_metrics) == [f"{site}_fwd" for site in sites]
    train, test = captured(model, sites, train_td["input_ids"]), captured(model, sites, test_td["input_ids"])
    for site, x, held in zip(sites, train, test, strict=True):
        by_hand = LogisticRegression(max_iter=500).fit(x, train_td["labels"].numpy())
        fitted = manager.estimators[f"{site}_fwd"]
        np.testing.assert_allclose(fitted.coef_, by_hand.coef_, rtol=1e-4, atol=1e-6)
        for metrics, features, data in ((manager.fit_metrics, x, train_td), (manager.predict_metrics, held, test_td)):
            expected = accuracy(by_hand.predict(features), data["labels"].numpy())
            assert metrics[f"{site}_fwd"] == expected
    assert manager.predict_metrics["transformer.h.0.mlp_fwd"]["accuracy"] > 0.8

    torch.testing.assert_close(test_td["logits"], plain, rtol=0, atol=0)
    assert set(test_td.keys()) == {"input_ids", "labels", "step_type", "logits"}
    assert [len(child._forward_hooks) for child in model.modules()] == hooks
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_the_manager_is_usable_after_the_context() -> None:
    actor, manager = categorical(), ProbeManager(LogisticRegression, {}, accuracy)
    with probing(manager).prepare(actor) as hooked:
        hooked(rows(80))
    with probing(manager).prepare(actor) as hooked:
        hooked(rows(40, step_type="predict"))
    assert manager.predict_metrics[f"{SITE}_fwd"]["rows"] == 40
    kept = manager.estimators[f"{SITE}_fwd"]
    manager.reset_metrics()
    assert not manager.fit_metrics
    assert not manager.predict_metrics
    with probing(manager).prepare(actor) as hooked:
        hooked(rows(40))
    assert manager.estimators[f"{SITE}_fwd"] is not kept
    manager.reset_estimators()
    assert not manager.estimators


# ---------------------------------------------------------------------- shapes and places


@pytest.mark.parametrize("batch", [(60,), (12, 5), (3, 4, 5)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("estimator", [LogisticRegression, LinearEstimator, Ridge])
def test_any_batch_shape_is_rows(batch: tuple[int, ...], last: bool, estimator: Callable[..., Any]) -> None:
    options = {"num_classes": 2, "epochs": 2} if estimator is LinearEstimator else {}
    actor, data = categorical(), rows(*batch)
    flat = data.clone().reshape(-1)
    found = []
    for one in (data, flat):
        if last:
            one["labels"] = one["labels"].unsqueeze(-1)
        manager = ProbeManager(estimator, options, lambda predictions, labels: {"rows": predictions})
        with torch.no_grad(), probing(manager).prepare(actor) as hooked:
            hooked(one)
        found.append(manager.fit_metrics[f"{SITE}_fwd"]["rows"])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert found[0].shape == (60,)


def test_a_single_row_is_predicted() -> None:
    manager = ProbeManager(LogisticRegression, {}, accuracy)
    with probing(manager).prepare(categorical()) as hooked:
        hooked(rows(50))
        hooked(rows(step_type="predict"))
    assert manager.predict_metrics[f"{SITE}_fwd"]["rows"] == 1


def test_probes_ride_a_rollout() -> None:
    """A probe of the user's own sees every step; a fitted manager scores each step of an environment."""
    net = TensorDictModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), ["observation"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical)
    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    env.set_seed(0)
    torch.manual_seed(0)
    plain = env.rollout(20, actor)
    recorder = Recorder()
    with Probing(SITE, lambda key, direction: recorder, additional_keys=["observation"]).prepare(actor) as hooked:
        env.set_seed(0)
        torch.manual_seed(0)
        data = env.rollout(20, hooked)
    assert set(data.keys(True, True)) == set(plain.keys(True, True))
    for key in plain.keys(True, True):
        torch.testing.assert_close(data[key], plain[key], rtol=0, atol=0)
    assert len(recorder.seen) == len(data)
    expected = torch.tanh(actor[0].module[0](data["observation"]))
    torch.testing.assert_close(torch.stack([one for one, _ in recorder.seen]), expected.detach())
    torch.testing.assert_close(torch.stack([more["observation"] for _, more in recorder.seen]), data["observation"])
    assert not any(one.requires_grad for one, _ in recorder.seen)

    manager = ProbeManager(LogisticRegression, {}, accuracy, allow_overwrite=True)
    data["labels"], data["step_type"] = torch.arange(len(data)) % 2, "fit"
    start = env.reset().set("labels", torch.tensor(1)).set("step_type", "predict")
    with probing(manager).prepare(actor) as hooked:
        hooked(data)
        env.rollout(5, hooked, tensordict=start, auto_reset=False)
    assert manager.fit_metrics[f"{SITE}_fwd"]["rows"] == len(data)
    assert manager.predict_metrics[f"{SITE}_fwd"]["rows"] == 1


def test_only_root_forwards_feed_probes() -> None:
    recorder = Recorder()
    actor = categorical()
    method = Compose(Saliency(when="step"), Probing(SITE, lambda key, direction: recorder))
    with method.prepare(actor) as hooked:
        hooked(rows(3))
        hooked.get_dist(rows(3))
        hooked.annotate(actor(rows(3)))
        weights = TensorDict.from_module(hooked).expand(2).clone()

        def functional(weights: TensorDict, data: TensorDict) -> torch.Tensor:
            with weights.to_module(hooked):
                return hooked.get_dist(data).logits

        torch.vmap(functional, (0, None))(weights, rows(3))
        assert not hooked._hooked.runtime.slots
    assert len(recorder.seen) == 1


def test_vmapped_forwards_feed_no_probe() -> None:
    recorder = Recorder()
    net = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["value"])
    with Probing("module.1", lambda key, direction: recorder).prepare(net) as hooked:
        values = torch.vmap(lambda x: hooked(TensorDict({"observation": x}, batch_size=3))["value"])(
            torch.randn(2, 3, FEATURES)
        )
    assert values.shape == (2, 3, 4)
    assert not recorder.seen


def test_a_policy_that_returns_a_new_tensordict_keeps_its_labels() -> None:
    manager = ProbeManager(LogisticRegression, {}, accuracy)
    policy = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["value"], inplace=False)
    with probing(manager, "module.1").prepare(policy) as hooked:
        output = hooked(rows(30))
    assert set(output.keys()) == {"value"}
    assert manager.fit_metrics["module.1_fwd"]["rows"] == 30


def test_probes_see_the_steered_activation() -> None:
    recorder, net, x = Recorder(), mlp(), torch.randn(5, FEATURES)
    steering = SteeringVectors({"1": torch.ones(HIDDEN)}, alpha=1.0)
    with Compose(steering, Probing("1", lambda k, d: recorder)).prepare(net) as hooked:
        hooked(TensorDict({"input": x}, batch_size=5))
    torch.testing.assert_close(recorder.seen[0][0], net[:2](x).detach() + 1)


@pytest.mark.parametrize("keyword", [False, True])
def test_inputs_are_probed_too(keyword: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(input=self.first(x)) if keyword else self.second(self.first(x))

    probes: dict[tuple[str, str], Recorder] = {}
    net, x = Net(), torch.randn(4, FEATURES)
    method = Probing(
        "(first|second)$",
        lambda key, direction: probes.setdefault((key, direction), Recorder()),
        directions=["fwd_pre", "fwd"],
    )
    with method.prepare(net) as hooked:
        hooked(TensorDict({"input": x}, batch_size=4))
    assert set(probes) == {(key, way) for key in ("first", "second") for way in ("fwd", "fwd_pre")}
    torch.testing.assert_close(probes["first", "fwd_pre"].seen[0][0], x)
    torch.testing.assert_close(probes["second", "fwd_pre"].seen[0][0], probes["first", "fwd"].seen[0][0])


def test_paths_start_where_relative_says_and_containers_are_not_meant() -> None:
    def names(pattern: str, module: nn.Module, **options: Any) -> list[str]:
        found: list[str] = []

        def factory(key: str, direction: str) -> Recorder:
            found.append(key)
            return Recorder()

        Probing(pattern, factory, **options).prepare(module).__enter__()
        return found

    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    assert names("", net) == ["0.0", "1"]
    assert names("0$", net) == ["0"]
    assert names("", net, classes_to_skip=[nn.ReLU]) == ["0", "0.0"]
    assert names(r"module\.0\.0", net, relative=False) == ["module.0.0"]
    assert names(SITE, categorical(), relative=False) == [SITE]
    with pytest.raises(SiteError, match=r"only modules of classes that Probing skips: '1' \(ReLU\)"):
        names("1$", net, classes_to_skip=[nn.ReLU])


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("listed", [True, False])
def test_an_absent_key_is_named(key: str, listed: bool) -> None:
    """Not in the TensorDict, or in it but not in additional_keys."""
    manager = ProbeManager(LogisticRegression, {}, accuracy)
    keys = KEYS if listed else [one for one in KEYS if one != key]
    with Probing(SITE, manager.probe_factory, additional_keys=keys).prepare(categorical()) as hooked:
        data = rows(20).exclude(key) if listed else rows(20)
        with pytest.raises(MissingKeyError, match=rf"(?i){key}.*put it in the TensorDict.*list it"):
            hooked(data)
        assert not hooked._hooked.runtime.slots


def test_a_manager_says_what_does_not_fit() -> None:
    manager, data = ProbeManager(LogisticRegression, {}, accuracy), rows(20)
    mixed = torch.stack([rows(), rows(step_type="predict")])
    assert isinstance(mixed.get("step_type"), NonTensorStack)
    with probing(manager).prepare(categorical()) as hooked:
        for bad, message in (
            (rows(20, step_type="train"), "step_type is 'fit' or 'predict', got 'train'"),
            (mixed, r"one string for the whole TensorDict"),
            (rows(20, step_type="predict"), "was never fitted"),
            (rows(20).set("labels", torch.zeros(20, 3)), r"labels of shape \(20, 3\) do not fit"),
            (rows(20).set("labels", torch.zeros(20, HIDDEN)), r"labels of shape \(20, 16\) do not fit"),
            (TensorDict({**rows(20), "labels": torch.zeros(1)}, []), r"labels of shape \(1,\) do not fit"),
            (rows(20).set("labels", "red"), "labels are a tensor of numbers"),
            (rows(0), "no rows to probe"),
        ):
            with pytest.raises(InputError, match=message):
                hooked(bad)
        assert not manager.fit_metrics
        assert not manager.estimators
        hooked(torch.stack([rows(20), rows(20)]))
        with pytest.raises(InputError, match="allow_overwrite=True"):
            hooked(data)


def test_probing_says_what_does_not_fit() -> None:
    actor = categorical()
    for make, message in (
        (lambda: Probing(SITE, Recorder, directions=["bwd"]), "for gradients"),
        (lambda: Probing(SITE, Recorder, additional_keys="labels"), r"additional_keys=\['labels'\]"),
        (lambda: Probing(SITE, lambda k, d: object()).prepare(actor).__enter__(), "has no method step"),
        (lambda: Probing(SITE, Recorder, additional_keys=["a", ("b", "a")]).prepare(actor).__enter__(), "as 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(SiteError, match="no submodule of ProbabilisticActor matches"):
        Probing("module.0.mlp", Recorder).prepare(actor).__enter__()


@pytest.mark.parametrize(("pattern", "message"), [("unused", "'unused' did not run"), ("unuse.$", "pattern matched")])
def test_a_site_that_does_not_run_is_an_error(pattern: str, message: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with Probing(pattern, Recorder).prepare(Net()) as hooked, pytest.raises(SiteError, match=message):
        hooked(TensorDict({"input": torch.randn(3, 2)}, batch_size=3))
    recorder = Recorder()
    with Probing("(un)?used$", lambda k, d: recorder).prepare(Net()) as hooked:
        hooked(TensorDict({"input": torch.randn(3, 2)}, batch_size=3))
    assert len(recorder.seen) == 1


def test_nested_keys_and_preprocessing() -> None:
    manager = ProbeManager(LinearEstimator, {"num_classes": 2}, accuracy, data_preprocess_callback=lambda x: x[..., :3])
    data = rows(30)
    data["concept", "labels"] = data.pop("labels")
    keys = [("concept", "labels"), "step_type"]
    with Probing(SITE, manager.probe_factory, additional_keys=keys).prepare(categorical()) as hooked:
        hooked(data)
    assert manager.estimators[f"{SITE}_fwd"].weights["weight"].shape == (2, 3)


def test_a_managed_probe_stays_in_its_process_and_copies_feed_it() -> None:
    manager = ProbeManager(LogisticRegression, {}, accuracy)
    with probing(manager).prepare(categorical()) as hooked:
        with pytest.raises(PreparationError, match="what it learned in a worker would be lost"):
            pickle.dumps(hooked)
        copy.deepcopy(hooked)(rows(30))
    assert manager.fit_metrics[f"{SITE}_fwd"]["rows"] == 30


def test_half_precision_activations_reach_scikit_learn() -> None:
    manager = ProbeManager(LogisticRegression, {}, accuracy)
    x = torch.randn(30, FEATURES, dtype=torch.bfloat16)
    data = TensorDict({"input": x, "labels": x[:, 0] > 0, "step_type": "fit"}, batch_size=30)
    with probing(manager, "0").prepare(mlp().to(torch.bfloat16)) as hooked:
        hooked(data)
    assert manager.fit_metrics["0_fwd"]["rows"] == 30
