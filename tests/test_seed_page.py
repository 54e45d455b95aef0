"""The code blocks of the page run as they are printed, and each key of its table is used."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import HookedModule
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.latent import ActivationAddition, ActivationPatching, SteeringVectors
from tdhook_rl.latent.probing import Probing
from tests import seed_page
from tests.seed_page import F64, Model, inputs, of_class, run_block


@pytest.fixture
def model() -> Model:
    return Model().double()


def from_zero(net: nn.Module, x: torch.Tensor, index: int, points: int = 2000) -> torch.Tensor:
    """Integrated gradients from a baseline of zero, by a fine midpoint rule."""
    path = (x * ((torch.arange(points, dtype=F64) + 0.5) / points)[:, None, None]).requires_grad_()
    return x * torch.autograd.grad(net(path)[..., index].sum(), path)[0].mean(0)


def test_workflow_1(model: Model) -> None:
    x, class_idx = inputs(2), 2
    scope = run_block(seed_page.WORKFLOW_1, model=model, x=x, baseline=torch.zeros_like(x), class_idx=class_idx)
    assert scope["td"].batch_size == ()
    torch.testing.assert_close(scope["attr"], from_zero(model, x, class_idx), rtol=1e-5, atol=1e-6)


def test_workflow_3() -> None:
    model = Model("layers").double()
    x, override_tensor = inputs(3), inputs(3)
    hooked = HookedModule.from_module(model)
    data = TensorDict({"input": x}, batch_size=3)
    scope = run_block(seed_page.WORKFLOW_3, hooked_module=hooked, data=data, override_tensor=override_tensor)
    torch.testing.assert_close(scope["cached"], model.layers[5].mlp(override_tensor))
    h = x
    for index, layer in enumerate(model.layers):
        h = h + layer.mlp(override_tensor if index == 5 else layer.attn(h))
    torch.testing.assert_close(data["output"], model.head(h))
    assert data["output"].requires_grad


def test_quick_patterns(model: Model) -> None:
    x, pos, neg, scale, index = inputs(2), inputs(7), inputs(4), 1.5, 1
    names = {"IntegratedGradients": IntegratedGradients, "ActivationAddition": ActivationAddition}
    scope = run_block(
        seed_page.QUICK_PATTERNS,
        **names,
        SteeringVectors=SteeringVectors,
        model=model,
        init_fn=of_class(index),
        x=x,
        baseline=torch.zeros_like(x),
        pos=pos,
        neg=neg,
        scale=scale,
    )
    torch.testing.assert_close(scope["attr"], from_zero(model, x, index), rtol=1e-5, atol=1e-6)

    def hidden(v: torch.Tensor) -> torch.Tensor:
        for layer in model.layer[:7]:
            v = layer(v)
        return model.layer[7].mlp(model.layer[7].attn(v))

    steer = hidden(pos).mean(0) - hidden(neg).mean(0)
    torch.testing.assert_close(scope["steer"], steer)  # the features of one sample, although no batch size was given
    torch.testing.assert_close(scope["out"]["output"], model(x) + scale * steer @ model.head.weight.T)


# ---------------------------------------------------------------------- the key table


@pytest.mark.parametrize("keys", seed_page.KEYS)
def test_the_key_table(keys: str, model: Model) -> None:
    x, other = inputs(), inputs()
    data = TensorDict({"input": x}, batch_size=5)
    if keys == '("baseline", "input")':
        with IntegratedGradients(init_attr_targets=of_class(0)).prepare(model) as hooked:
            at_x = hooked(data.clone().set(("baseline", "input"), x))["attr", "input"]
            elsewhere = hooked(data.clone().set(("baseline", "input"), other))["attr", "input"]
        assert not at_x.any()
        assert elsewhere.any()
    elif keys == '("positive", "input"), ("negative", "input")':
        both = TensorDict({("positive", "input"): x, ("negative", "input"): other}, batch_size=5)
        swapped = TensorDict({("positive", "input"): other, ("negative", "input"): x}, batch_size=5)
        with ActivationAddition(["layer.7.mlp"]).prepare(model) as hooked:
            steer = hooked(both)["steer", "layer.7.mlp"]
            assert torch.equal(hooked(swapped)["steer", "layer.7.mlp"], -steer)
    elif keys == '("patched", "input")':
        with ActivationPatching(["layer.7"]).prepare(model) as hooked:
            found = hooked(data.set(("patched", "input"), other))
        assert torch.equal(found["patched", "output"], found["output"])  # everything passes through the last layer
    elif keys == '("attr", key)':
        with Saliency(init_attr_targets=of_class(0)).prepare(model, in_keys=["pixels"]) as hooked:
            assert hooked(TensorDict({"pixels": x}))["attr", "pixels"].shape == x.shape
    else:
        seen = []

        class Reader:
            def step(self, activation, labels, step_type):
                seen.append((labels, step_type))

        read = Probing("head", lambda key, direction: Reader(), additional_keys=keys.split(", "))
        with read.prepare(model) as hooked:
            hooked(data.set("labels", torch.arange(5)).set("step_type", "fit"))
        assert seen[0][0].tolist() == [0, 1, 2, 3, 4]
        assert seen[0][1] == "fit"
