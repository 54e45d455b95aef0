"""Tensors of another make (sparse, nested, quantised, complex, without data) where numbers are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    IntegratedGradients,
    LinearProbe,
    Saliency,
    SteeringVectors,
    targets,
)
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.latent import DirectionalAblation, DirectionClamping, StateSubtraction, SteeringVector, UnitValues
from tdhook_rl.method import Method
from tdhook_rl.sweeps import ablate_units, attribution_patching, patch_sites, steering_sweep

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that they are on the way out
    QUANTISED = torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)
ODD_TENSORS = {
    "sparse": torch.ones(8).to_sparse(), "meta": torch.empty(8, device="meta"), "complex": torch.ones(8) + 1j,
    "quantised": QUANTISED, "nested": torch.nested.nested_tensor([torch.ones(8)]),
    "eight bits": torch.ones(8).to(torch.float8_e4m3fn),
}  # fmt: skip
NAMED = {
    "sparse": "sparse", "meta": "no numbers", "quantised": "dequantize", "complex": "real numbers", "nested": "nested",
}  # fmt: skip


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def data() -> TensorDict:
    return TensorDict({"input": torch.randn(3, 6)}, [3])


def prepared(method: Method) -> None:
    with method.prepare(net()) as hooked:
        hooked(data())


def patched(one: Any) -> None:
    patch_sites(net(), data(), data(), "1", direction=one, metric=lambda out: out["output"][:, 0], controls=2)


def swept(one: Any) -> None:
    steering_sweep(net(), CueCorners(), {"mine": {"1": one}})


TAKES: dict[str, Callable[[Any], Any]] = {
    "steering": lambda one: prepared(SteeringVectors({"1": one})),
    "a steering vector": lambda one: SteeringVector(vector=one, path="1"),
    "ablation": lambda one: prepared(DirectionalAblation({"1": one})),
    "clamping": lambda one: prepared(DirectionClamping({"1": one}, value=1.0)),
    "values of units": lambda one: prepared(UnitValues({"1": [0]}, value={"1": one})),
    "a baseline": lambda one: IntegratedGradients(baseline=one, target=targets.output_sum()),
    "a probe": lambda one: LinearProbe(weight=one, bias=torch.zeros(2), path="1"),
    "a sweep": swept,
    "a patch": patched,
    "a patch by site": lambda one: patched({"1": one}),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("name", TAKES)
def test_a_tensor_of_another_make_is_named(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=NAMED[kind]):
        TAKES[name](ODD_TENSORS[kind])


@pytest.mark.parametrize("name", ["steering", "a steering vector", "ablation", "values of units", "a patch"])
def test_floats_of_eight_bits_become_usual_ones(name: str) -> None:
    TAKES[name](ODD_TENSORS["eight bits"])


@pytest.mark.parametrize("name", ["ablation", "clamping", "a patch"])
def test_one_number_is_no_direction(name: str) -> None:
    with pytest.raises(InputError, match=r"has the shape of the (module|site)'s features, got one number"):
        TAKES[name](torch.tensor(1.0))


def test_a_vector_without_a_name_is_told_how_to_be_given_one() -> None:
    with pytest.raises(InputError, match=r"got a tensor of shape \(8,\) .*: \{'a name': \{'1': tensor\}\} acts at '1'"):
        steering_sweep(net(), CueCorners(), {"1": torch.ones(8)})


class Graph(nn.Module):
    """Mixes its features along edges, and holds tensors of other layouts beside."""

    def __init__(self, where: str) -> None:
        super().__init__()
        edges = (torch.rand(4, 4).round() * torch.randn(4, 4)).to_sparse()
        beside = [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=one) for one in LAYOUTS]
        if where == "buffers":
            self.register_buffer("edges", edges)
            for number, one in enumerate(beside):
                self.register_buffer(f"beside{number}", one)
        else:
            self.edges = edges
            self.beside0, self.beside1 = beside
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sparse.mm(self.edges, x.T).T.tanh())


LAYOUTS = (torch.strided, torch.jagged)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("where", ["buffers", "attributes"])
def test_policies_that_hold_them_are_explained_as_they_are_now(where: str, when: str, mode: Any) -> None:
    policy, x = Graph(where), torch.randn(5, 4)
    method = Saliency(target=targets.logit(0), when=when)  # type: ignore[arg-type]
    with method.prepare(policy, in_keys=["seen"], out_keys=["logits"]) as hooked, mode():
        found = TensorDict({"seen": x}, [5])
        for _ in range(2):
            found = hooked.annotate(found) if when == "batch" else hooked(found)
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                right = torch.autograd.grad(policy(leaf)[:, 0].sum(), leaf)[0]
            torch.testing.assert_close(found["attr", "seen"], right)
            policy.edges.mul_(2.0)


class Padded(nn.Module):
    """Reads tokens, of which some are padding: torch's encoder makes nested tensors of them, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[..., 0, :])


KEYS: dict[str, Any] = {"in_keys": ["tokens", "padding"], "out_keys": ["logits"]}


def tokens(seed: int) -> TensorDict:
    draws = torch.Generator().manual_seed(seed)
    value, padding = torch.randn(3, 4, 4, generator=draws), torch.arange(4) >= torch.tensor([[2], [3], [3]])
    return TensorDict({"tokens": value, "padding": padding}, 3)


AT: dict[str, Callable[[str], Method]] = {
    "steering": lambda site: SteeringVectors({site: torch.ones(4)}),
    "a function": lambda site: SteeringVectors(site, lambda module_key, output: output * 2),
    "ablation": lambda site: DirectionalAblation({site: torch.ones(4)}),
    "units": lambda site: UnitValues({site: [0]}),
    "subtraction": lambda site: StateSubtraction(site, lambda rows: rows.set("tokens", rows["tokens"] * 0)),
    "patching": lambda site: ActivationPatching(site),
    "addition": lambda site: ActivationAddition(site),
    "caching": lambda site: ActivationCaching(site),
    "saliency": lambda site: Saliency(input_modules=site, target=targets.logit(0), when="step"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*stored.*differ")
@pytest.mark.parametrize("site", ["encoder.layers.0", "encoder.layers.1.linear2", "encoder.layers.0.self_attn"])
@pytest.mark.parametrize("name", AT)
def test_a_module_that_gives_nested_tensors_is_named_with_what_to_do(name: str, site: str) -> None:
    policy, data = Padded().eval(), tokens(0)
    for key in ("patched", "positive", "negative"):
        data[key] = tokens(1)
    said = rf"'{site}' \(\w+\) gives a nested tensor.*: set its `use_nested_tensor = False`"
    with AT[name](site).prepare(policy, **KEYS) as hooked:
        if name not in ("patching", "addition"):  # whose passes of their own are without gradients
            hooked(data.clone())  # with them torch makes none, and what is kept of that call must not hide it
        with torch.no_grad(), pytest.raises(InputError, match=said) if name != "saliency" else nullcontext():
            hooked(data.clone())  # a saliency is found with gradients
    policy.encoder.use_nested_tensor = False
    with AT[name](site).prepare(policy, **KEYS) as hooked, torch.no_grad():
        hooked(data.clone())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_causal_tests_name_it_too() -> None:
    policy, pair = TensorDictModule(Padded().eval(), **KEYS), (tokens(0), tokens(1))
    for one in (patch_sites, attribution_patching, ablate_units):
        given = pair[:1] if one is ablate_units else pair
        with pytest.raises(InputError, match=r"'module.encoder.layers.0' .*gives a nested tensor"):
            one(policy, *given, "module.encoder.layers.0", metric="logits")  # type: ignore[operator]
