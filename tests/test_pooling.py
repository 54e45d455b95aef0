"""Max pooling of a hooked copy: other kernels, the same bits."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.hooking.pooling import ENTRIES, speed_up_pooling

WINDOWS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (5, 3)},
    {"kernel_size": (3, 2), "stride": (1, 2), "dilation": 2, "ceil_mode": True},
]


def both(**window: object) -> tuple[nn.Module, nn.Module]:
    plain, quick = nn.Sequential(nn.MaxPool2d(**window)), nn.Sequential(nn.MaxPool2d(**window))
    speed_up_pooling(quick)
    return plain[0], quick[0]


def frames(*shape: int) -> Tensor:
    """Frames with many ties: half of the entries are zero."""
    return torch.randn(*shape).relu()


@pytest.mark.parametrize("shape", [(4, 6, 30, 31), (1, 32, 16, 16), (1, 3, 6, 6), (3, 60, 61), (64, 64, 5, 3)])
@pytest.mark.parametrize("window", WINDOWS)
def test_outputs_and_gradients_are_the_same_bits_in_the_same_layout(window: dict, shape: tuple[int, ...]) -> None:
    plain, quick = both(**window)
    x = frames(*shape).requires_grad_()
    expected, found = plain(x), quick(x)
    outer = torch.randn_like(expected)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    (ours,), (theirs,) = (torch.autograd.grad(y, x, outer, create_graph=True) for y in (found, expected))
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
    with torch.no_grad():
        assert torch.equal(quick(x), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float64, torch.bfloat16])
def test_every_type(dtype: torch.dtype) -> None:
    plain, quick = both(kernel_size=2)
    x = torch.randint(0, 100, (4, 3, 84, 84)).to(dtype)
    assert torch.equal(quick(x), plain(x))


def test_tracing_and_forward_derivatives() -> None:
    plain, quick = both(kernel_size=2)
    x = frames(2, 4, 40, 40)
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(4, 4, 1), quick), x)
    assert traced(x).shape == (2, 4, 20, 20)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        found, expected = (torch.autograd.forward_ad.unpack_dual(pool(dual)) for pool in (quick, plain))
    assert torch.equal(found.tangent, expected.tangent)


def test_numbers_that_are_none_go_through() -> None:
    plain, quick = both(kernel_size=3, stride=2, padding=1)
    x = frames(2, 4, 40, 40)
    x[0, 0, 3, 5], x[1, 2, 7, 7], x[1, 3] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(quick(x).nan_to_num(7.0), plain(x).nan_to_num(7.0))
    assert torch.equal(quick(x).isnan(), plain(x).isnan())


def test_a_gradient_of_a_gradient() -> None:
    plain, quick = both(kernel_size=2)
    x = frames(2, 4, 40, 40).requires_grad_()
    found = []
    for pool in (plain, quick):
        (first,) = torch.autograd.grad(pool(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*found)


def test_transforms_and_formats_of_the_caller() -> None:
    plain, quick = both(kernel_size=3, stride=2, padding=1)
    x = frames(3, 4, 8, 40, 40)
    assert torch.equal(torch.vmap(quick)(x), torch.vmap(plain)(x))
    gradient = [torch.func.grad(lambda v, pool=pool: pool(v).square().sum())(x[0]) for pool in (plain, quick)]
    assert torch.equal(*gradient)
    last = x[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(quick(last), plain(last))
    assert quick(last).stride() == plain(last).stride()
    assert all(torch.equal(a, b) for a, b in zip(_indices(x[0]), _indices(x[0], quicken=True), strict=True))


def _indices(x: Tensor, quicken: bool = False) -> tuple[Tensor, Tensor]:
    net = nn.Sequential(nn.MaxPool2d(2, return_indices=True))
    if quicken:
        speed_up_pooling(net)
    return net[0](x)


def test_a_hooked_network_computes_what_the_users_does() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 4)
    )
    x = torch.rand(5, 3, 32, 32)
    assert x[0].numel() * 16 // 3 > ENTRIES
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
        assert type(hooked.hooked_root[1]) is nn.MaxPool2d
        found["output"].square().sum().backward()
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    assert torch.equal(found["output"], net(x))
    assert all(torch.equal(p.grad, one) for p, one in zip(net.parameters(), ours, strict=True))
    leaf = x.clone().requires_grad_()
    assert torch.equal(found["attr", "input"], torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)[0])


@pytest.mark.parametrize("shape", [(8, 64, 64, 1), (64, 1, 1, 256), (4, 40, 40, 3)])
def test_frames_that_were_permuted(shape: tuple[int, ...]) -> None:
    plain, quick = both(kernel_size=1)
    x = frames(*shape).permute(0, 3, 1, 2)
    assert torch.equal(quick(x), plain(x))
    assert quick(x).stride() == plain(x).stride()


def test_a_class_that_is_patched_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quick = both(kernel_size=2)
    x, usual = frames(2, 4, 40, 40), nn.MaxPool2d.forward
    expected = 2 * plain(x)
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, value: 2 * usual(self, value))
    assert torch.equal(quick(x), expected)


class Doubling(nn.MaxPool2d):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * super().forward(value)


def test_a_class_that_is_changed_afterwards() -> None:
    plain, quick = both(kernel_size=2)
    x = frames(2, 4, 40, 40)
    quick.__class__ = Doubling
    assert torch.equal(quick(x), 2 * plain(x))


def test_frames_of_one_place_before_a_convolution() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(256, 32, 1), nn.Flatten())
    x = torch.randn(16, 256, 2, 2)
    with ActivationCaching("1").prepare(net) as hooked, torch.no_grad():
        found = hooked(TensorDict({"input": x}, batch_size=16))
        assert torch.equal(found["output"], net(x))


def test_hooks_on_the_pooling_see_its_output() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16 * 256, 4))
    x = torch.rand(5, 3, 32, 32)
    with ActivationCaching("1").prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    assert torch.equal(found["cache", "1"], net[1](net[0](x)))
