"""Tensors of another make (sparse, nested, quantised, complex, without data) where numbers are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import IntegratedGradients, LinearProbe, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.latent import DirectionalAblation, DirectionClamping, SteeringVector, UnitValues
from tdhook_rl.method import Method
from tdhook_rl.sweeps import patch_sites, steering_sweep

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
