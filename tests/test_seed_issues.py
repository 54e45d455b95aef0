"""What the page warns of: each issue and pitfall with its error and its solution, and the feedback loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from tensordict import TensorDict
from torch import nn

from tdhook_rl import HookedModule
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.latent import ActivationCaching, SteeringVectors
from tdhook_rl.latent.probing import BilinearEstimator, BilinearProbeManager, ProbeManager, Probing
from tdhook_rl.metrics import InfidelityMetric, SensitivityMetric
from tests import seed_page
from tests.seed_page import F64, Model, inputs, of_class

ISSUES: dict[str, Callable[[], None]] = {}
PITFALLS: dict[str, Callable[[], None]] = {}


def of(rows: dict[str, Callable[[], None]], *names: str):
    def register(function):
        rows.update(dict.fromkeys(names, function))
        return function

    return register


def accuracy(predictions, labels) -> dict[str, float]:
    return {"accuracy": float((torch.as_tensor(predictions) == torch.as_tensor(labels)).double().mean())}


def labelled(x: torch.Tensor, **entries) -> TensorDict:
    return TensorDict({"input": x, "labels": (x[:, 0] > 0).long(), **entries}, batch_size=len(x))


@of(ISSUES, "KeyError on TensorDict")
@of(PITFALLS, "Nested keys as strings")
def keys_are_tuples() -> None:
    model, x = Model().double(), inputs()
    with IntegratedGradients(init_attr_targets=of_class(0)).prepare(model) as hooked:
        with pytest.raises(KeyError, match=r"needs the baseline of 'input' under \('baseline', 'input'\)") as caught:
            hooked(TensorDict({"input": x, "baseline/input": inputs()}))
        assert "nearest: 'baseline/input'" in str(caught.value)
        td = hooked(TensorDict({"input": x, ("baseline", "input"): inputs()}))
    with pytest.raises(KeyError, match=r"attr/input"):
        td["attr/input"]
    assert td.get(("attr", "input")).shape == x.shape
    with ActivationCaching("head").prepare(model) as hooked, pytest.raises(KeyError, match=r"reads 'input'.*'inputs'"):
        hooked(TensorDict({"inputs": x}))


@of(ISSUES, "HuggingFace model fails")
def a_model_of_token_ids_needs_its_keys() -> None:
    class Tokens(nn.Module):
        """Fails as the models of transformers do: its argument may be absent."""

        def forward(self, input_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            if input_ids is None:
                raise ValueError("You have to specify either input_ids or inputs_embeds")
            return {"logits": nn.functional.one_hot(input_ids, 5).double()}

    model, td = nn.Sequential(Tokens()), TensorDict({"input_ids": torch.arange(4)}, batch_size=4)
    with ActivationCaching("0").prepare(model) as hooked:
        with pytest.raises(MissingKeyError, match=r"reads 'input'.*nearest: 'input_ids'.*prepare\(module, in_keys="):
            hooked(td)
    with ActivationCaching("0").prepare(model, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
        assert torch.equal(hooked(td)["logits"], td["cache", "0"])


@of(ISSUES, "BilinearProbeManager shape mismatch")
def bilinear_probes_begin_and_end() -> None:
    x = inputs(32)
    manager = BilinearProbeManager([("layer.0.mlp", "layer.1.mlp")], BilinearEstimator, {"epochs": 2}, accuracy)
    probing = Probing(manager.key_pattern, manager.probe_factory, additional_keys=["labels", "step_type"])
    with probing.prepare(Model()) as hooked:
        data = TensorDict({"input": x.float(), "labels": x[:, 0].float(), "step_type": "fit"}, batch_size=32)
        with pytest.raises(InputError, match=r"call manager\.before_all\(\)"):
            hooked(data.clone())
        manager.before_all()
        hooked(data.clone())
        manager.after_all()
    assert list(manager.fit_metrics) == ["layer.0.mlp_layer.1.mlp_fwd"]


@of(ISSUES, "Module path not found")
def paths_from_the_module_or_from_its_wrapper() -> None:
    model, data = Model().double(), labelled(inputs(), step_type="fit")
    with pytest.raises(SiteError, match=r"no submodule of Model matches 'module\.head'; nearest: 'head'"):
        ActivationCaching("module.head").prepare(model).__enter__()
    hooked = HookedModule.from_module(model)
    with hooked.run(data) as run:
        inner, outer = run.get("layer.7.mlp"), run.get("module.layer.7.mlp", relative=False)
    assert torch.equal(inner.resolve(), outer.resolve())
    names = []

    class Reader:
        def __init__(self, key: str, direction: str) -> None:
            names.append(key)

        def step(self, activation) -> None:
            pass

    for pattern, relative in ((r"layer.\d.mlp$", True), (r"module.layer.\d.mlp$", False)):
        with Probing(pattern, Reader, relative=relative).prepare(model) as hooked:
            hooked(data)
    assert names == [f"{prefix}layer.{index}.mlp" for prefix in ("", "module.") for index in range(8)]


@of(ISSUES, "Probing step_type missing")
@of(PITFALLS, "Probing without step_type")
def probes_are_told_whether_to_fit() -> None:
    model, x = Model().double(), inputs(20)

    def manager() -> ProbeManager:
        return ProbeManager(LogisticRegression, {}, accuracy)

    keys = ["labels", "step_type"]
    with Probing("layer.0.mlp", manager().probe_factory).prepare(model) as hooked:
        with pytest.raises(MissingKeyError, match=r"additional_keys=\[\"labels\", \"step_type\"\]"):
            hooked(labelled(x, step_type="fit"))
    with Probing("layer.0.mlp", manager().probe_factory, additional_keys=keys).prepare(model) as hooked:
        with pytest.raises(MissingKeyError, match="a probe reads 'step_type'"):
            hooked(labelled(x))
        with pytest.raises(InputError, match=r"step_type is 'fit' or 'predict', got 'train'"):
            hooked(labelled(x, step_type="train"))
        with pytest.raises(InputError, match="asked to predict but was never fitted"):
            hooked(labelled(x, step_type="predict"))
        with pytest.raises(MissingKeyError, match="a probe reads 'labels'"):
            hooked(TensorDict({"input": x, "step_type": "fit"}, batch_size=20))
        hooked(labelled(x, step_type="fit"))
        hooked(labelled(x, step_type="predict"))


@of(ISSUES, "IG baseline wrong shape")
def baselines_match_their_inputs() -> None:
    x = inputs()
    wrong = {
        r"has shape \(6,\) on cpu; it must match 'input', which has shape \(5, 6\)": torch.zeros(6, dtype=F64),
        r"has shape \(5, 6\) on meta; it must match 'input'.* on cpu": torch.zeros(5, 6, dtype=F64, device="meta"),
        r"is torch\.float32; it must match 'input', which is torch\.float64": torch.zeros(5, 6),
    }
    with IntegratedGradients(init_attr_targets=of_class(0)).prepare(Model().double()) as hooked:
        for message, baseline in wrong.items():
            with pytest.raises(InputError, match=rf"the baseline \('baseline', 'input'\) {message}"):
                hooked(TensorDict({"input": x, ("baseline", "input"): baseline}))
        assert hooked(TensorDict({"input": x, ("baseline", "input"): torch.zeros_like(x)}))["attr", "input"].any()


@of(PITFALLS, "IG without baseline")
def integrated_gradients_need_a_baseline() -> None:
    with IntegratedGradients(init_attr_targets=of_class(0)).prepare(Model().double()) as hooked:
        with pytest.raises(MissingKeyError, match=r"\('baseline', 'input'\).*Put a neutral input there \(zeros, say\)"):
            hooked(TensorDict({"input": inputs()}))


@of(PITFALLS, "Wrong module path")
def the_error_names_the_paths_that_there_are() -> None:
    for path, nearest in (("transformer.h.5.mlp", r"layer\.\d"), ("layers.5.mlp", r"layer\.5\.mlp")):
        with pytest.raises(SiteError, match=rf"no submodule of Model matches '{path}'; nearest: '{nearest}"):
            SteeringVectors({path: torch.zeros(6)}).prepare(Model()).__enter__()


@pytest.mark.parametrize("issue", seed_page.ISSUES)
def test_each_issue_and_its_solution(issue: str) -> None:
    ISSUES[issue]()


@pytest.mark.parametrize("pitfall", seed_page.PITFALLS)
def test_each_pitfall_gives_its_error(pitfall: str) -> None:
    PITFALLS[pitfall]()


# ---------------------------------------------------------------------- the feedback loops


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
def test_attributions_are_scored_on_default_settings(method: type) -> None:
    model, x = Model().double(), inputs(20)
    data = TensorDict({"input": x, ("baseline", "input"): torch.zeros_like(x)}, batch_size=20)
    with method(init_attr_targets=of_class(1)).prepare(model) as hooked:
        td = hooked(data.clone())
        infidelity, sensitivity = InfidelityMetric()(hooked, td), SensitivityMetric()(hooked, td)
        shuffled = td.clone().set(("attr", "input"), td["attr", "input"].flip(-1))
        assert infidelity.shape == sensitivity.shape == (20,)
        assert float(infidelity.mean()) < 1e-2 * float(InfidelityMetric()(hooked, shuffled).mean())
        assert float(SensitivityMetric(perturb_radius=0.2)(hooked, td).mean()) > float(sensitivity.mean()) > 0
        whole = hooked(TensorDict(dict(data.items())))  # without a batch size the whole is one row
        assert InfidelityMetric()(hooked, whole).shape == SensitivityMetric()(hooked, whole).shape == ()


def test_metrics_of_train_and_test_show_an_overfitted_probe() -> None:
    model, x = Model(width=40).double(), torch.randn(60, 40, dtype=F64)
    labels = {"real": (x[:, :2].sum(-1) > 0).long(), "random": torch.randint(0, 2, (60,))}
    gaps = {}
    for name, values in labels.items():
        manager = ProbeManager(LogisticRegression, {"C": 1e3, "max_iter": 1000}, accuracy)
        keys = ["labels", "step_type"]
        with Probing("layer.0", manager.probe_factory, additional_keys=keys).prepare(model) as hooked:
            for step_type, rows in (("fit", slice(0, 30)), ("predict", slice(30, 60))):
                hooked(TensorDict({"input": x[rows], "labels": values[rows], "step_type": step_type}, batch_size=30))
        fit, predict = manager.fit_metrics["layer.0_fwd"], manager.predict_metrics["layer.0_fwd"]
        assert fit["accuracy"] == 1.0
        gaps[name] = fit["accuracy"] - predict["accuracy"]
    assert gaps["random"] > 0.3
    assert gaps["random"] > gaps["real"]


def test_a_probe_is_chosen_by_cross_validation() -> None:
    model, x = Model().double(), inputs(60)
    grid = {"estimator": Ridge(), "param_grid": {"alpha": [1e-3, 1e6]}, "cv": 3}
    manager = ProbeManager(GridSearchCV, grid, lambda p, y: {"mse": float(((p - y) ** 2).mean())})
    with Probing("layer.0", manager.probe_factory, additional_keys=["labels", "step_type"]).prepare(model) as hooked:
        hooked(TensorDict({"input": x, "labels": x[:, 0], "step_type": "fit"}, batch_size=60))
    assert manager.estimators["layer.0_fwd"].best_params_ == {"alpha": 1e-3}


def test_the_effect_of_steering_is_ablated_layer_by_layer() -> None:
    model, x, steer = Model().double(), inputs(), torch.randn(6, dtype=F64)
    layers = ["layer.2.mlp", "layer.5.mlp", "layer.7.mlp"]

    def output(kept: list[str]) -> torch.Tensor:
        if not kept:
            return model(x).detach()
        with SteeringVectors(modules_to_steer=kept, steer_fn=lambda k, o: o + steer).prepare(model) as hooked:
            return hooked(TensorDict({"input": x}))["output"].detach()

    steered = output(layers)
    effects = [float((output([one for one in layers if one != gone]) - steered).abs().max()) for gone in layers]
    assert min(effects) > 1e-3
    # The last layer adds to what the head reads: its part is known exactly.
    torch.testing.assert_close(steered - output(layers[:2]), (steer @ model.head.weight.T).expand(5, -1))
    assert not torch.allclose(steered, output([]))
