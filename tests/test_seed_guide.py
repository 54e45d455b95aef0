"""The method selection guide of the page: every class with its key parameters, against what it should compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import nn

from tdhook_rl import attribution, latent, weights
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.attribution.grad_cam import DimsConfig, GradCAM
from tdhook_rl.latent import ActivationAddition, ActivationPatching, SteeringVectors
from tdhook_rl.latent.probing import ProbeManager, Probing
from tdhook_rl.weights import Adapters, Pruning
from tests import seed_page
from tests.oracles import row_gradients
from tests.seed_page import F64, Model, inputs, of_class

ROWS: dict[str, Callable[[Model], None]] = {}


def row(name: str):
    def register(function):
        ROWS[name] = function
        return function

    return register


@row("Saliency")
def saliency(model: Model) -> None:
    x = inputs()
    path = "layer.7.mlp"
    with Saliency(init_attr_targets=of_class(1), input_modules=[path]).prepare(model) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    torch.testing.assert_close(found["attr", path], model.head.weight[1].expand(5, -1))
    with Saliency(init_attr_targets=of_class(1)).prepare(model) as hooked:
        found = hooked(TensorDict({"input": x}))["attr", "input"]
    torch.testing.assert_close(found, row_gradients(lambda v: model(v)[..., 1], x))


@row("IntegratedGradients")
def integrated_gradients(model: Model) -> None:
    x, baseline = inputs(), inputs()
    data = TensorDict({"input": x, ("baseline", "input"): baseline}, batch_size=5)
    with IntegratedGradients(init_attr_targets=of_class(0), n_steps=64).prepare(model) as hooked:
        found = hooked(data)["attr", "input"]
    torch.testing.assert_close(found.sum(-1), (model(x) - model(baseline))[:, 0], rtol=1e-6, atol=1e-8)


@row("GradCAM")
def grad_cam(model: Model) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 2, 7, 7, dtype=F64)
    dims = {"1": DimsConfig(weight_pooling_dims=(2, 3), feature_sum_dims=(1,))}
    with GradCAM(modules_to_attribute=dims, init_attr_targets=of_class(2)).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))["attr", "1"]
    torch.testing.assert_close(found, torch.einsum("c,bcij->bij", net[4].weight[2] / 25, net[:2](x)))


@row("ActivationAddition")
def activation_addition(model: Model) -> None:
    pos, neg = inputs(), inputs()
    with ActivationAddition(["layer.0.mlp"]).prepare(model) as hooked:
        data = TensorDict({("positive", "input"): pos, ("negative", "input"): neg}, batch_size=5)
        steer = hooked(data)["steer", "layer.0.mlp"]
    first = model.layer[0]
    expected = first.mlp(first.attn(pos)).mean(0) - first.mlp(first.attn(neg)).mean(0)
    torch.testing.assert_close(steer, expected.expand(5, -1))


@row("SteeringVectors")
def steering_vectors(model: Model) -> None:
    x, seen = inputs(), []

    def steer_fn(module_key, output):
        seen.append(module_key)
        return 2 * output

    with SteeringVectors(modules_to_steer=["layer.7.mlp", "head"], steer_fn=steer_fn).prepare(model) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))["output"]
    h = x
    for layer in model.layer[:7]:
        h = layer(h)
    torch.testing.assert_close(found, 2 * model.head(h + 2 * model.layer[7].mlp(model.layer[7].attn(h))))
    assert seen == ["layer.7.mlp", "head"]


@row("ActivationPatching")
def activation_patching(model: Model) -> None:
    x, other = inputs(), inputs()

    def patch_fn(module_key, output, output_to_patch):
        assert module_key == "layer.0.mlp"
        return output + (output_to_patch - output) / 4

    with pytest.warns(FutureWarning, match="the other way round"):
        method = ActivationPatching(["layer.0.mlp"], patch_fn=patch_fn)
    with method.prepare(model) as hooked:
        found = hooked(TensorDict({"input": x, ("patched", "input"): other}, batch_size=5))
    first = model.layer[0]
    h = other + (first.mlp(first.attn(x)) + 3 * first.mlp(first.attn(other))) / 4
    for layer in model.layer[1:]:
        h = layer(h)
    torch.testing.assert_close(found["patched", "output"], model.head(h))
    torch.testing.assert_close(found["output"], model(x))


@row("Probing")
def probing(model: Model) -> None:
    x = inputs(60)
    manager = ProbeManager(LogisticRegression, {}, lambda p, y: {"accuracy": float((p == y).mean())})
    keys = ["labels", "step_type"]
    with Probing("layer.(0|3).mlp$", manager.probe_factory, additional_keys=keys).prepare(model) as hooked:
        data = TensorDict({"input": x, "labels": (x[:, 0] > 0).long()}, batch_size=60)
        hooked(data[:40].set("step_type", "fit"))
        hooked(data[40:].set("step_type", "predict"))
    first = model.layer[0]
    features, labels = first.mlp(first.attn(x)).detach().numpy(), data["labels"].numpy()
    by_hand = LogisticRegression().fit(features[:40], labels[:40])
    assert manager.fit_metrics["layer.0.mlp_fwd"]["accuracy"] == by_hand.score(features[:40], labels[:40])
    assert manager.predict_metrics["layer.0.mlp_fwd"]["accuracy"] == by_hand.score(features[40:], labels[40:])
    assert list(manager.fit_metrics) == ["layer.0.mlp_fwd", "layer.3.mlp_fwd"]


@row("Pruning")
def pruning(model: Model) -> None:
    asked = []

    def importance_callback(module_key, parameter_name, parameter):
        asked.append((module_key, parameter_name))
        return parameter.abs() if module_key == "head" and parameter_name == "weight" else None

    with Pruning(importance_callback=importance_callback, amount_to_prune=0.5).prepare(model) as hooked:
        found = hooked(TensorDict({"input": inputs()}, batch_size=5))
        pruned, whole = hooked.module.head.weight.detach(), model.head.weight.detach()
        kept = pruned != 0
        assert int(kept.sum()) == 9
        assert float(pruned[kept].abs().min()) >= float(whole[~kept].abs().max())
        h = found["input"]
        for layer in model.layer:
            h = layer(h)
        torch.testing.assert_close(found["output"], nn.functional.linear(h, pruned, model.head.bias))
    assert ("layer.0.attn", "bias") in asked
    assert bool((whole != 0).all())


@row("Adapters")
def adapters(model: Model) -> None:
    x, adapter = inputs(), nn.Linear(6, 6).double()
    with Adapters(adapters={"layer.7.mlp": (adapter, "layer.0.mlp", "layer.7.mlp")}).prepare(model) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))["output"]
    h = x
    for layer in model.layer[:7]:
        h = layer(h)
    torch.testing.assert_close(found, model.head(h + adapter(model.layer[0].mlp(model.layer[0].attn(x)))))


@pytest.mark.parametrize("name", seed_page.METHODS)
def test_the_method_selection_guide(name: str) -> None:
    ROWS[name](Model().double())


def test_every_class_is_where_the_page_says() -> None:
    from tdhook_rl.latent import probing

    for module, names in (
        (attribution, "Saliency IntegratedGradients GradCAM LRP GuidedBackpropagation ActivationMaximisation"),
        (latent, "ActivationAddition SteeringVectors ActivationPatching ActivationCaching"),
        (probing, "Probing ProbeManager BilinearProbeManager"),
        (weights, "Pruning Adapters TaskVectors"),
    ):
        for name in names.split():
            assert getattr(module, name).__module__.startswith(module.__name__)
