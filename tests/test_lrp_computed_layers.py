"""LRP of layers that compute with another weight than a plain layer of their class: adapters, masks, norms.

The oracle is the same network with plain layers of the effective weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchrl.modules import NoisyLinear

from tdhook_rl import LRP
from tdhook_rl.attribution.lrp_rules import AlphaBeta, Epsilon, Gamma, Rule, Uniform
from tdhook_rl.errors import InputError
from tests.test_lrp_functions import F64, W, exact, gap


class LoRA(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))

    @property
    def effective(self) -> Tensor:
        return self.weight + self.up.weight @ self.down.weight


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective, self.bias)

    @property
    def effective(self) -> Tensor:
        return self.weight.tril()


class Curved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid().mean(-1, keepdim=True)


def patched() -> nn.Linear:
    layer = nn.Linear(W, W)
    layer.forward = lambda x: F.linear(x, layer.weight * torch.arange(1, W + 1), layer.bias)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: LoRA(W, W),
    "masked": lambda: Masked(W, W),
    "noisy": lambda: NoisyLinear(W, W),
    "pruned": lambda: prune.random_unstructured(nn.Linear(W, W), "weight", 0.3),
    "parametrised": lambda: parametrizations.spectral_norm(nn.Linear(W, W)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(W, W)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_computed_layer_is_the_plain_layer_of_its_effective_weight(name: str, training: bool) -> None:
    layer = LAYERS[name]().double()
    net = nn.Sequential(nn.Linear(W, W), nn.ReLU(), layer, nn.ReLU(), nn.Linear(W, 2)).double().train(training)
    x = torch.randn(4, W, dtype=F64)
    with LRP(rule_mapper=exact()).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=4))
    before = net[1](net[0](x))
    with torch.no_grad():  # the linear map of the layer, from its own outputs
        zero = layer(torch.zeros(1, W, dtype=F64))
        effective = (layer(torch.eye(W, dtype=F64)) - zero).T
    twin = nn.Sequential(*(copy.deepcopy(net[i]) for i in (0, 1)), nn.Linear(W, W), net[3], net[4]).double()
    twin[2].weight.data, twin[2].bias.data = effective, zero[0]
    if name == "parametrised" and training:  # its power iteration has gone on
        assert torch.allclose(twin(x), data["output"], atol=0.05)
        return
    torch.testing.assert_close(twin(x), data["output"])
    assert before.shape == (4, W)
    with LRP(rule_mapper=exact()).prepare(twin) as hooked:
        expected = hooked(TensorDict({"input": x}, batch_size=4))["attr", "input"]
    torch.testing.assert_close(data["attr", "input"], expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("wrap", [spectral_norm, weight_norm])
def test_norms_of_old(wrap: Callable) -> None:
    layer = wrap(nn.Linear(W, W, bias=False).double())
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(W, 2, bias=False)).double().eval()
    with torch.no_grad():
        net(torch.randn(2, W, dtype=F64))
    assert gap(net, torch.randn(4, W, dtype=F64)) < 1e-9


def test_a_layer_whose_forward_was_replaced() -> None:
    layer, x = patched().double(), torch.randn(4, W, dtype=F64)
    layer.bias.data.zero_()
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(W, 2, bias=False)).double()
    assert gap(net, x) < 1e-9
    twin = nn.Sequential(nn.Linear(W, W, bias=False), nn.ReLU(), net[2]).double()
    twin[0].weight.data = layer.weight.data * torch.arange(1, W + 1)
    found = []
    for one in (net, twin):
        with LRP(rule_mapper=exact()).prepare(one) as hooked:
            found.append(hooked(TensorDict({"input": x}, batch_size=4))["attr", "input"])
    torch.testing.assert_close(*found)


def test_rules_that_look_at_weights_need_the_layer_to_compute_with_them() -> None:
    x = torch.randn(4, W, dtype=F64)
    method = LRP(rule_mapper=Uniform(Gamma(0.2, 0.0)))
    for layer, fits in ((NoisyLinear(W, W), True), (parametrizations.weight_norm(nn.Linear(W, W)), True)):
        net = nn.Sequential(layer, nn.ReLU(), nn.Linear(W, 1)).double()
        plain = copy.deepcopy(net)
        plain[0] = nn.Linear(W, W).double()
        plain[0].weight.data, plain[0].bias.data = layer.weight.detach().clone(), layer.bias.detach().clone()
        results = []
        for one in (net, plain):
            with method.prepare(one) as hooked:
                results.append(hooked(TensorDict({"input": x}, batch_size=4))["attr", "input"])
        assert fits
        torch.testing.assert_close(*results)
    for layer in (LoRA(W, W), Masked(W, W)):
        net = nn.Sequential(layer, nn.ReLU(), nn.Linear(W, 1)).double()
        with method.prepare(net) as hooked, pytest.raises(InputError, match=rf"'0' \({type(layer).__name__}\)"):
            hooked(TensorDict({"input": x}, batch_size=4))


def test_a_subclass_that_is_not_linear_is_refused_by_name() -> None:
    net = nn.Sequential(Curved(W, W), nn.ReLU(), nn.Linear(W, 1)).double()
    with LRP().prepare(net) as hooked, pytest.raises(InputError, match=r"'0' \(Curved\).*not linear"):
        hooked(TensorDict({"input": torch.randn(4, W, dtype=F64)}, batch_size=4))


class Leaky(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.leaky_relu(x, 0.2))


def test_a_subclass_that_is_linear_in_pieces_is_explained_by_the_piece_it_is_in() -> None:
    net = nn.Sequential(Leaky(W, W, bias=False), nn.ReLU(), nn.Linear(W, 2, bias=False)).double()
    assert gap(net, torch.randn(4, W, dtype=F64)) < 1e-9


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("rule", [Epsilon(0.0), AlphaBeta(2.0, 1.0, 1e-9), Gamma(0.3, 0.0)], ids=str)
def test_a_batch_norm_in_training_mode_is_the_map_by_the_statistics_of_the_batch(
    norm: type, affine: bool, rule: Rule
) -> None:
    mapper = Uniform(Epsilon(0.0), names={"1": rule}, epsilon=0.0)
    maps = norm is nn.BatchNorm2d
    first = nn.Conv2d(2, 3, 1) if maps else nn.Linear(W, 3)
    net = nn.Sequential(first, norm(3, affine=affine), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1)).double().train()
    x = torch.randn(5, *((2, 3, 3) if maps else (W,)), dtype=F64)
    net(x)
    with LRP(rule_mapper=mapper).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    plain = copy.deepcopy(net).eval()
    before = net[0](x).transpose(0, 1).flatten(1).detach()
    plain[1].running_mean, plain[1].running_var = before.mean(1), before.var(1, correction=0)
    with LRP(rule_mapper=mapper).prepare(plain) as hooked:
        expected = hooked(TensorDict({"input": x}, batch_size=5))
    torch.testing.assert_close(found["output"], expected["output"])
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"])
