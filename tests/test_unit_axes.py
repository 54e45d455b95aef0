"""Which axis of an activation holds the units: layers of every kind, half of whose units are dead."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.metrics import dormant_units
from tdhook_rl.rollout import NetworkDiagnostics
from tdhook_rl.sweeps import patch_units


class Calls(nn.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, function: object, **modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()


def dead(layer: nn.Module, units: int = 8) -> nn.Module:
    """The first half of the units of a layer never pass the ReLU behind it, the others always do."""
    with torch.no_grad():
        layer.weight[: units // 2] = 0
        layer.weight.mul_(0.1)
        layer.bias[: units // 2] = -1
        layer.bias[units // 2 :] = 5
    return layer


def end(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :2]


def share(net: nn.Module, site: str, states: Tensor, **options: object) -> float:
    policy = TensorDictModule(net, ["observation"], ["logits"])
    diagnostics = NetworkDiagnostics(policy, sites=[site], **options)
    return diagnostics.update(TensorDict({"observation": states}, [len(states)]))[f"dead/{site}"]


CONVS = {1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d), 2: (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d)}
CONVS[3] = (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveMaxPool3d)


@pytest.mark.parametrize("size", [6, 8], ids=["", "as wide as deep"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_of_maps(dims: int, size: int) -> None:
    conv, _, pool = CONVS[dims]
    net = nn.Sequential(
        dead(conv(2, 8, 1)), nn.ReLU(), nn.Identity(), nn.Dropout(0.0), pool(2), nn.Flatten(2), nn.ELU()
    )
    states = torch.randn(16, 2, *(size,) * dims)
    for site in range(1, 5):
        assert share(net, f"module.{site}", states) == 0.5
    assert share(net, "module.5", states) == 0.5
    assert share(net, "module.6", states) == 0.5
    whole = nn.Sequential(nn.Sequential(dead(conv(2, 8, 1)), nn.ReLU()), nn.Flatten())
    assert share(whole, "module.0", states) == 0.5
    assert share(whole, "module.1", states) == 0.5  # every place of a channel is a unit then


IN_PLACE = [
    lambda: nn.ReLU(inplace=True), lambda: nn.Hardtanh(inplace=True), lambda: nn.Dropout(0.0, inplace=True),
    lambda: nn.Sequential(nn.ELU(inplace=True)),
]  # fmt: skip


@pytest.mark.parametrize("one", IN_PLACE)
@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 8)], ids=["", "norm"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_that_are_told_to_work_in_place_keep_the_channels(dims: int, norm: nn.Module, one: object) -> None:
    """Of maps as wide as deep, too; a hook at such a layer gives it a copy, which nothing has noted."""
    conv, _, pool = CONVS[dims]
    net = nn.Sequential(
        conv(2, 8, 1), norm, one(), pool(1), nn.Flatten(), nn.Linear(8 if dims == 3 else 8**dims * 8, 1)
    )
    states = [TensorDict({"input": torch.randn(4, 2, *(8,) * dims)}, 4) for _ in range(2)]
    table = patch_units(net, *states, ["1", "2", "3"], metric="output")
    assert table.components.axes == dict.fromkeys("123", -1 - dims)
    assert (
        share(nn.Sequential(dead(conv(2, 8, 1)), one(), nn.ReLU(), nn.Flatten(2)), "module.1", states[0]["input"]) < 1
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_after_a_norm(dims: int) -> None:
    conv, norm, _ = CONVS[dims]
    for layer in (norm(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8) if dims == 2 else norm(8)):
        net = nn.Sequential(conv(2, 8, 1), layer, nn.ReLU(), nn.Flatten()).eval()
        with torch.no_grad():
            bias = torch.nn.Parameter(torch.tensor([-100.0] * 4 + [1.0] * 4))
            layer.bias = bias
            layer.weight = nn.Parameter(torch.full((8,), 0.1))
        assert share(net, "module.2", torch.randn(16, 2, *(8,) * dims)) == 0.5


@pytest.mark.parametrize("lead", [(3,), (8,), (3, 7), (3, 8, 2)], ids=str)
def test_units_of_agents_and_tokens(lead: tuple[int, ...]) -> None:
    net = nn.Sequential(dead(nn.Linear(5, 8)), nn.ReLU(), nn.LayerNorm(8, elementwise_affine=False), nn.Flatten())
    assert share(net, "module.1", torch.randn(16, *lead, 5)) == 0.5
    assert share(nn.Sequential(net[:2], nn.Flatten()), "module.0", torch.randn(16, *lead, 5)) == 0.5


@pytest.mark.parametrize("size", [5, 8])
def test_agents_and_time_with_pixels(size: int) -> None:
    def forward(inner: nn.ModuleDict, x: Tensor) -> Tensor:
        return end(inner["relu"](inner["conv"](x.flatten(0, 1)).unflatten(0, x.shape[:2])))

    net = Calls(forward, conv=dead(nn.Conv2d(2, 8, 1)), relu=nn.ReLU())
    assert share(net, "module.inner.relu", torch.randn(16, 8, 2, size, size)) == 0.5


def test_residual_blocks_and_modules_of_the_users_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.two(self.one(x).relu())).relu()

    block = Block()
    with torch.no_grad():
        block.two.weight[:4], block.two.bias[:4] = 0, -100
    assert share(nn.Sequential(block, nn.Flatten()), "module.0", torch.randn(16, 3, 8)) == 0.5
    own = nn.Sequential(dead(nn.Linear(5, 8)), nn.ReLU(), Swish(), nn.Flatten())
    assert share(own, "module.2", torch.randn(16, 3, 5)) == 0.5


def test_a_module_used_twice_is_asked_run_by_run() -> None:
    def forward(inner: nn.ModuleDict, x: Tensor) -> Tensor:
        maps = inner["relu"](inner["conv"](x))
        return end(inner["relu"](inner["linear"](maps)))

    net = Calls(forward, conv=dead(nn.Conv1d(2, 8, 1)), linear=dead(nn.Linear(6, 8)), relu=nn.ReLU())
    states = torch.randn(16, 2, 6)
    assert share(net, "module.inner.relu@0", states) == 0.5
    assert share(net, "module.inner.relu@-1", states) == 0.5


def test_where_nothing_tells_it_asks_and_is_told() -> None:
    states = torch.randn(16, 8, 8)
    for net, site in (
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "module.0"),
        (nn.Sequential(nn.Linear(8, 8), Swap(), nn.Flatten()), "module.1"),
    ):
        with pytest.raises(InputError, match=rf"which axis .*{site}.*units="):
            share(net, site, states)
    channels = torch.rand(16, 8, 8) * (torch.arange(8) > 3)[:, None]
    net = nn.Sequential(nn.ReLU(), nn.Flatten())
    assert share(net, "module.0", channels, units={"module.0": 1}) == 0.5
    assert share(net, "module.0", channels, units=-2) == 0.5
    assert share(net, "module.0", channels, units=-1) == 0
    for axis in (0, 3, -3):
        with pytest.raises(InputError, match="axis 0 are the rows"):
            share(net, "module.0", channels, units=axis)
    with pytest.raises(InputError, match=r"takes int \| .* got True"):
        share(net, "module.0", channels, units=True)
    with pytest.raises(SiteError, match=r"not looked at; nearest: 'module\.0'"):
        share(net, "module.0", channels, units={"module.9": 1})
    assert dormant_units(channels, axis=1).tolist() == [True] * 4 + [False] * 4
    with pytest.raises(InputError, match="axis 0 are the rows"):
        dormant_units(channels, axis=0)


def test_recurrent_layers_and_attention() -> None:
    for layer in (nn.GRU(5, 8, batch_first=True), nn.LSTM(5, 8, batch_first=True)):
        net = Calls(lambda inner, x: end(inner["rnn"](x)[0]), rnn=layer)
        assert share(net, "module.inner.rnn", torch.randn(16, 8, 5)) == 0
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    assert share(nn.Sequential(encoder, nn.Flatten()), "module.0", torch.randn(16, 8, 8)) == 0


def test_a_network_that_nobody_else_keeps_and_one_that_is_no_tensordict_module() -> None:
    net = nn.Sequential(dead(nn.Conv1d(2, 8, 1)), nn.ReLU(), nn.Flatten())
    diagnostics = NetworkDiagnostics(net, sites=["1"])
    del net
    data = TensorDict({"input": torch.randn(16, 2, 5)}, [16])
    for _ in range(3):
        assert diagnostics.update(data)["dead/1"] == 0.5
    loose = NetworkDiagnostics(TensorDictModule(nn.Linear(2, 3), ["a"], ["b"]), sites=["module"])
    assert loose.update(TensorDict({"a": torch.randn(8, 2)}, [8]))["cka_first/module"] == pytest.approx(1)


def test_similarity_is_debiased() -> None:
    net = nn.Embedding(64, 500)
    policy = TensorDictModule(net, ["cell"], ["features"])
    diagnostics = NetworkDiagnostics(policy, sites=["module"])
    assert diagnostics.update(TensorDict({"cell": torch.arange(64)}, [64]))["cka_first/module"] == pytest.approx(1)
    nn.init.normal_(net.weight)
    assert abs(diagnostics.update()["cka_first/module"]) < 0.05
    few = NetworkDiagnostics(policy, sites=["module"], rows=3)
    assert math.isnan(few.update(TensorDict({"cell": torch.arange(64)}, [64]))["cka_first/module"])
