"""Guided backpropagation of ReLUs that are no module's output: functions, methods, statements in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from tdhook_rl import GuidedBackpropagation
from tdhook_rl.errors import SiteError


class Guided(torch.autograd.Function):
    """A ReLU with the clamp written out."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class Net(nn.Module):
    def __init__(self, second: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.relu, self.in_place, self.second = nn.ReLU(), nn.ReLU(inplace=True), second

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self, self.two(self.relu(self.one(x)))))


def statement(act: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def second(net: Net, h: Tensor) -> Tensor:
        act(net, h)
        return h

    return second


RELUS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "module": lambda net, h: net.relu(h),
    ".forward": lambda net, h: net.relu.forward(h),
    "F.relu": lambda net, h: F.relu(h),
    "torch.relu": lambda net, h: torch.relu(h),
    "method": lambda net, h: h.relu(),
    "clamp": lambda net, h: h.clamp(min=0),
    "clamp_min": lambda net, h: torch.clamp_min(h, 0.0),
    "threshold": lambda net, h: F.threshold(h, 0, 0),
    "maximum": lambda net, h: torch.maximum(h, torch.zeros(())),
    "max of zeros like it": lambda net, h: torch.max(torch.zeros_like(h), h),
    "clamp by a tensor": lambda net, h: h.clamp(min=torch.zeros(h.shape[-1])),
    "in place": lambda net, h: F.relu(h, inplace=True),
    "beside NumPy": lambda net, h: F.relu(h) + torch.from_numpy(0 * h.detach().numpy()),  # where functorch fails
    "statement": statement(lambda net, h: net.in_place(h)),
    "statement of a function": statement(lambda net, h: h.relu_()),
    "statement of a clamp": statement(lambda net, h: h.clamp_(min=0)),
    "of a part": statement(lambda net, h: (h[:, :8].relu_(), net.in_place(h[:, 8:]))),
}


def attribution(net: nn.Module, x: Tensor) -> Tensor:
    with GuidedBackpropagation().prepare(net) as hooked:
        first = hooked(TensorDict({"input": x.clone()}, batch_size=len(x)))["attr", "input"]
        again = hooked(TensorDict({"input": x.clone()}, batch_size=len(x)))["attr", "input"]
    torch.testing.assert_close(first, again)
    return first


def case(name: str) -> tuple[Net, Tensor, Tensor]:
    by_hand = Net(lambda net, h: Guided.apply(h))
    by_hand.relu.forward = Guided.apply
    net = Net(RELUS[name])
    net.load_state_dict(by_hand.state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    return net, x.detach(), torch.autograd.grad(by_hand(x).sum(), x)[0]


@pytest.mark.parametrize("name", RELUS)
def test_the_gradient_is_clamped_at_every_relu(name: str) -> None:
    net, x, expected = case(name)
    torch.testing.assert_close(attribution(net, x), expected)
    with GuidedBackpropagation().prepare(net) as hooked:
        with torch.inference_mode():
            found = hooked(TensorDict({"input": x.clone()}, batch_size=5))["attr", "input"]
        torch.testing.assert_close(found.clone(), expected)


@pytest.mark.parametrize("name", ["F.relu", "method", "clamp", "in place", "maximum", "clamp by a tensor"])
def test_under_vmap(name: str) -> None:
    net, x, expected = case(name)
    with GuidedBackpropagation().prepare(net) as hooked:
        found = torch.vmap(lambda row: hooked(TensorDict({"input": row}, batch_size=[]))["attr", "input"])(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("module", "F.relu", "clamp", "maximum", "threshold", "statement of a clamp")
        ),
        "statement of a function",
        "clamp by a tensor",
    ],
)
def test_under_compile(name: str) -> None:
    net, x, expected = case(name)
    torch._dynamo.reset()
    with GuidedBackpropagation().prepare(net) as hooked:
        compiled = torch.compile(hooked, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(TensorDict({"input": x}, batch_size=5))["attr", "input"], expected)


def bounded(h: Tensor) -> Tensor:
    return torch.maximum(h, torch.full((), -0.1)) + F.threshold(h, -0.1, -0.1) + h.clamp(min=torch.tensor(-0.1))


@pytest.mark.parametrize("mode", ["grad", "inference", "vmap", pytest.param("compile", marks=pytest.mark.slow)])
def test_other_bounds_are_left_alone(mode: str) -> None:
    by_hand = Net(lambda net, h: bounded(h))
    by_hand.relu.forward = Guided.apply
    net = Net(lambda net, h: bounded(h))
    net.load_state_dict(by_hand.state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(by_hand(x).sum(), x)
    data = TensorDict({"input": x.detach()}, batch_size=5)
    with GuidedBackpropagation().prepare(net) as hooked:
        if mode == "vmap":
            found = torch.vmap(lambda row: hooked(TensorDict({"input": row}))["attr", "input"])(x.detach())
        elif mode == "compile":
            torch._dynamo.reset()
            found = torch.compile(hooked, backend="eager")(data)["attr", "input"]
        else:
            with torch.inference_mode(mode == "inference"):
                found = hooked(data)["attr", "input"].clone()
    torch.testing.assert_close(found, expected)


class Left(nn.ReLU):
    """A ReLU that is left alone."""


def test_classes_that_are_skipped_and_networks_without_a_relu() -> None:
    net = Net(lambda net, h: net.relu(F.relu(h) - F.relu(-h)))
    net.relu = Left()
    x = torch.randn(5, 4)
    with GuidedBackpropagation(classes_to_skip=[Left]).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))["attr", "input"]
    twin = Net(lambda net, h: net.relu(Guided.apply(h) - Guided.apply(-h)))
    twin.load_state_dict(net.state_dict())
    at = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(twin(at).sum(), at)[0])
    net = Net(lambda net, h: h.tanh())
    net.relu = nn.Tanh()
    net.in_place = nn.Identity()
    with GuidedBackpropagation().prepare(net) as hooked, pytest.raises(SiteError, match="no ReLU in Net"):
        hooked(TensorDict({"input": x}, batch_size=5))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x)


def test_a_relu_in_compiled_code_is_refused() -> None:
    net = Net(lambda net, h: scripted(h))
    with GuidedBackpropagation().prepare(net) as hooked, pytest.raises(SiteError, match="ReLU"):
        hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
