"""Grad-CAM and guided backpropagation against hand-built maps and hand-written passes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Compose, targets
from tdhook_rl.attribution import GradCAM, GuidedBackpropagation, Saliency
from tdhook_rl.attribution.grad_cam import DimsConfig
from tdhook_rl.errors import InputError, SiteError
from tests.policies import CASES

F64 = torch.float64


def cam_net() -> nn.Sequential:
    """Global average pooling and a linear head: where Grad-CAM is CAM (Zhou et al. 2016)."""
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).double()


def logit(index: int) -> targets.Target:
    return targets.Target("logit", lambda run: run.outputs["output"][..., index])


@pytest.mark.parametrize("dims", [DimsConfig(), DimsConfig((2, 3), (1,))])
def test_grad_cam_is_cam_after_global_average_pooling(dims: DimsConfig) -> None:
    net = cam_net()
    x = torch.randn(6, 3, 8, 8, dtype=F64)
    with GradCAM(modules_to_attribute={"1": dims}, target=logit(2)).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=6))["attr", "1"]
    expected = torch.einsum("c,bchw->bhw", net[4].weight[2], net[:2](x)) / 36
    torch.testing.assert_close(found, expected)
    with GradCAM(modules_to_attribute={"1": dims}, target=logit(2), relu=True, upsample_to=(8, 8)).prepare(
        net
    ) as hooked:
        upsampled = hooked(TensorDict({"input": x}, batch_size=6))["attr", "1"]
    assert upsampled.shape == (6, 8, 8)
    assert float(upsampled.min()) >= 0


@pytest.mark.parametrize("dims", [DimsConfig(), DimsConfig((2, 3), (1,))])
def test_grad_cam_of_a_policy_with_time_and_batch(dims: DimsConfig) -> None:
    case = CASES["pixels"]
    actor = case.build()
    data = actor(case.data(2, 4)).detach()
    with GradCAM(modules_to_attribute={case.site: dims}).prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", case.site]
        flat = hooked.annotate(data.reshape(-1))["attr", case.site]
    assert found.shape == (2, 4, 6, 6)
    torch.testing.assert_close(found.reshape(8, 6, 6), flat)


def test_grad_cam_refuses_what_it_cannot_do() -> None:
    net = cam_net()
    data = TensorDict({"input": torch.randn(2, 3, 8, 8, dtype=F64)}, batch_size=2)
    with pytest.raises(InputError, match="modules_to_attribute="):
        GradCAM()
    with pytest.raises(InputError, match="belong to Saliency"):
        GradCAM(modules_to_attribute={"1": DimsConfig()}, input_modules=["0"])
    with GradCAM(modules_to_attribute={"1": DimsConfig((-5,), (1,))}).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"dimension -5.*3 feature dimensions"):
            hooked(data)
    with GradCAM(modules_to_attribute={"3": DimsConfig((), ())}, upsample_to=(4, 4)).prepare(net) as hooked:
        with pytest.raises(InputError, match="rows and columns"):
            hooked(data)


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def guided_by_hand(net: nn.Sequential, x: torch.Tensor, index: int) -> torch.Tensor:
    """The deconvolution and the ReLU mask, written out layer by layer."""
    first = net[0](x)
    second = net[2](first.relu())
    signal = net[4].weight[index].expand(len(x), -1)
    signal = signal.clamp(min=0) * (second > 0)
    signal = signal @ net[2].weight
    signal = signal.clamp(min=0) * (first > 0)
    return signal @ net[0].weight


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_backpropagation_equals_the_hand_written_pass(inplace: bool) -> None:
    net = relu_net()
    x = torch.randn(7, 6, dtype=F64)
    expected = guided_by_hand(net, x, 1)
    for module in net:
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    data = TensorDict({"input": x}, batch_size=7)
    with GuidedBackpropagation(target=logit(1)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(data.clone())["attr", "input"], expected)
        assert not hooked._hooked.bound[0]._by_function  # modules are guided without a look at every function
        with torch.inference_mode():
            torch.testing.assert_close(hooked(data.clone())["attr", "input"], expected)


def test_it_is_the_gradient_where_everything_is_positive_and_differs_elsewhere() -> None:
    net = relu_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
    data = TensorDict({"input": torch.rand(4, 6, dtype=F64)}, batch_size=4)
    method = Compose(GuidedBackpropagation(target=logit(0)), Saliency(target=logit(0), attribution_key="gradient"))
    with method.prepare(net) as hooked:
        found = hooked(data.clone())
    torch.testing.assert_close(found["attr", "input"], found["gradient", "input"])
    net = relu_net()
    with method.prepare(net) as hooked:  # the neighbour in the Compose sees plain gradients
        found = hooked(data.clone())
    x = data["input"].clone().requires_grad_()
    torch.testing.assert_close(found["gradient", "input"], torch.autograd.grad(net(x)[:, 0].sum(), x)[0])
    assert not torch.allclose(found["attr", "input"], found["gradient", "input"])


def test_a_net_without_relu_modules_is_refused() -> None:
    with pytest.raises(SiteError, match=r"no ReLU in Sequential"):
        GuidedBackpropagation().prepare(nn.Sequential(nn.Linear(2, 2), nn.Tanh())).__enter__()
