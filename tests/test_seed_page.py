"""The snippets and tables of the page that this library implements, with `tdhook` replaced by `tdhook_rl`."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import nn

from tdhook_rl.errors import MissingKeyError, SiteError
from tdhook_rl.method import HookedModule


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x + self.attn(x))


class Model(nn.Module):
    """A stack with the paths that the page uses: `layer.7.mlp`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(width) for _ in range(8)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x)
        return self.head(x)


class Transformer(nn.Module):
    """Token ids to logits, with the paths `transformer.h.N.mlp`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(20, width), "h": nn.ModuleList([Layer(width) for _ in range(11)])}
        )
        self.lm_head = nn.Linear(width, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](input_ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def model() -> Model:
    return Model()


def test_quick_pattern_attribution(model: Model) -> None:
    from tdhook_rl.attribution import IntegratedGradients

    x, baseline, class_idx = torch.randn(4, 6), torch.zeros(4, 6), 2

    def init_fn(targets, _):
        return TensorDict(out=targets["output"][..., class_idx], batch_size=targets.batch_size)

    with IntegratedGradients(init_attr_targets=init_fn).prepare(model) as hooked:
        td = hooked(TensorDict({"input": x, ("baseline", "input"): baseline}))
        attr = td.get(("attr", "input"))
    change = (model(x) - model(baseline))[:, class_idx]
    torch.testing.assert_close(attr.sum(-1), change, atol=1e-4, rtol=1e-4)


def test_quick_pattern_steering(model: Model) -> None:
    from tdhook_rl.latent import ActivationAddition, SteeringVectors

    x, pos, neg, scale = torch.randn(5, 6), torch.randn(7, 6), torch.randn(7, 6), 1.5
    with ActivationAddition(["layer.7.mlp"]).prepare(model) as hooked:
        steer = hooked(TensorDict({("positive", "input"): pos, ("negative", "input"): neg})).get(
            ("steer", "layer.7.mlp")
        )
    with SteeringVectors(modules_to_steer=["layer.7.mlp"], steer_fn=lambda k, o: o + scale * steer).prepare(
        model
    ) as hooked:
        out = hooked(TensorDict({"input": x}))
    assert steer.shape == (6,)
    torch.testing.assert_close(out["output"], model(x) + scale * steer @ model.head.weight.T)


def test_workflow_2_probing() -> None:
    from tdhook_rl.latent.probing import ProbeManager, Probing

    model = Transformer()
    labels = torch.randint(0, 2, (40,))
    ids = labels[:, None] * 10 + torch.randint(0, 10, (40, 5))

    def compute_metrics(predictions, targets):
        return {"accuracy": float((torch.as_tensor(predictions) == torch.as_tensor(targets)).float().mean())}

    def batch(step_type: str, rows: slice) -> TensorDict:
        return TensorDict({"input_ids": ids[rows], "labels": labels[rows], "step_type": step_type}, batch_size=[20])

    manager = ProbeManager(LogisticRegression, {}, compute_metrics)
    with Probing(
        "transformer.h.(0|5|10).mlp$",
        manager.probe_factory,
        additional_keys=["labels", "step_type"],
    ).prepare(model, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
        hooked(batch("fit", slice(0, 20)))
        hooked(batch("predict", slice(20, 40)))
    assert {key.split("_")[0] for key in manager.fit_metrics} == {f"transformer.h.{n}.mlp" for n in (0, 5, 10)}
    assert set(manager.predict_metrics) == set(manager.fit_metrics)


def test_every_class_of_the_selection_guide_is_where_the_page_says() -> None:
    from tdhook_rl import attribution, latent, weights
    from tdhook_rl.latent import probing

    for module, names in (
        (attribution, "Saliency IntegratedGradients GradCAM LRP GuidedBackpropagation"),
        (latent, "ActivationAddition SteeringVectors ActivationPatching ActivationCaching"),
        (probing, "Probing ProbeManager BilinearProbeManager"),
        (weights, "Pruning Adapters TaskVectors"),
    ):
        for name in names.split():
            assert getattr(module, name).__module__.startswith(module.__name__)


def test_pitfalls_give_their_errors(model: Model) -> None:
    from tdhook_rl.attribution import IntegratedGradients
    from tdhook_rl.latent import ActivationCaching
    from tdhook_rl.latent.probing import ProbeManager, Probing

    x = torch.randn(4, 6)
    with IntegratedGradients().prepare(model) as hooked, pytest.raises(MissingKeyError, match="baseline"):
        hooked(TensorDict({"input": x}, batch_size=4))
    manager = ProbeManager(LogisticRegression, {}, lambda p, y: {})
    with Probing("layer.0.mlp$", manager.probe_factory, additional_keys=["labels", "step_type"]).prepare(
        model
    ) as hooked:
        with pytest.raises(MissingKeyError, match="step_type"):
            hooked(TensorDict({"input": x, "labels": torch.zeros(4)}, batch_size=4))
    with pytest.raises(SiteError, match="nearest"):
        ActivationCaching("layers.5.mlp").prepare(model).__enter__()


def test_the_path_of_a_wrapped_module_from_the_wrapper(model: Model) -> None:
    data = TensorDict({"input": torch.randn(4, 6)}, batch_size=4)
    hooked = HookedModule.from_module(model)
    with hooked.run(data) as run:
        inner = run.get("layer.7.mlp")
        outer = run.get("module.layer.7.mlp", relative=False)
    assert torch.equal(inner.resolve(), outer.resolve())
