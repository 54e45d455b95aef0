"""Saliency explains the policy's own forward where that records a graph anyway, and a second pass elsewhere."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.errors import TargetError


class Counting(nn.Linear):
    """Counts its calls, outside of itself: a replay does not count in what a policy holds."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x)


@pytest.fixture
def net() -> nn.Sequential:
    Counting.calls = 0
    return nn.Sequential(Counting(6, 8), nn.Tanh(), nn.Linear(8, 3))


def passes(net: nn.Sequential) -> int:
    return net[0].calls


def data(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 6)}, batch_size=batch)


def test_one_pass_with_gradients_on_and_two_without(net: nn.Sequential) -> None:
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        one = data(5)
        shared = hooked(one.clone())
        assert passes(net) == 1
        with torch.no_grad():
            second = hooked(one.clone())
        assert passes(net) == 3
    assert torch.equal(shared["output"], second["output"])
    torch.testing.assert_close(shared["attr", "input"], second["attr", "input"], rtol=0, atol=0)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
def test_the_caller_keeps_its_tensors_and_can_train_through_the_outputs(net: nn.Sequential, batch: tuple) -> None:
    one = data(*batch)
    x = one["input"]
    with Saliency().prepare(net) as hooked:
        found = hooked(one)
        assert found["input"] is x
        assert not x.requires_grad
        assert not found["attr", "input"].requires_grad
        found["output"].square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for ours, theirs in zip(gradients, net.parameters(), strict=True):
        assert torch.equal(ours, theirs.grad)


def test_inputs_that_require_gradients_are_explained_in_a_second_pass(net: nn.Sequential) -> None:
    one = data(5)
    one["input"].requires_grad_()
    with Saliency().prepare(net) as hooked:
        found = hooked(one)
        assert passes(net) == 2
        found["output"].sum().backward()
    assert one["input"].grad is not None
    torch.testing.assert_close(one["input"].grad, found["attr", "input"])


@pytest.mark.parametrize("where", [0, 2])
def test_frozen_parameters_are_explained_in_a_second_pass(net: nn.Sequential, where: int) -> None:
    net[where].requires_grad_(False)
    one = data(5)
    with Saliency().prepare(net) as hooked:
        found = hooked(one.clone())
    assert passes(net) == 2
    assert found["output"].requires_grad == net(one["input"]).requires_grad


def test_several_methods_share_the_pass(net: nn.Sequential) -> None:
    vector = torch.randn(8)
    method = Compose(
        ActivationCaching("1"),
        SteeringVectors({"1": vector}),
        Saliency(target={"first": targets.logit(0, "output"), "last": targets.logit(2, "output")}),
        Saliency(input_modules=["1"], attribution_key="inner"),
    )
    one = data(5)
    with method.prepare(net) as hooked:
        found = hooked(one.clone())
        assert passes(net) == 1
    x = one["input"].requires_grad_()
    hidden = net[1](net[0](x))
    output = net[2](hidden + vector)
    torch.testing.assert_close(found["cache", "1"], hidden)
    torch.testing.assert_close(found["output"], output)
    for name, index in (("first", 0), ("last", 2)):
        (expected,) = torch.autograd.grad(output[:, index].sum(), x, retain_graph=True)
        torch.testing.assert_close(found["attr", name, "input"], expected)
    torch.testing.assert_close(found["inner", "1"], torch.autograd.grad(output.sum(), hidden)[0])


def test_methods_that_need_passes_of_their_own_keep_them(net: nn.Sequential) -> None:
    method = Compose(Saliency(), IntegratedGradients(baseline=0.0, n_steps=3, attribution_key="path"))
    one = data(4)
    with method.prepare(net) as hooked:
        hooked(one.clone())  # in which it is found out that rows do not meet
        before = passes(net)
        found = hooked(one.clone())
    assert passes(net) - before == 2  # its own, and one for the whole path
    change = (net(one["input"]) - net(torch.zeros(4, 6))).sum(-1)
    torch.testing.assert_close(found["path", "input"].sum(-1), change, atol=1e-2, rtol=0)


def test_an_error_of_the_target_gives_the_caller_its_input_back(net: nn.Sequential) -> None:
    one = data(5)
    x = one["input"]
    with Saliency(target=targets.logit(9, "output")).prepare(net) as hooked:
        with pytest.raises(TargetError, match="3 entries"):
            hooked(one)
        assert one["input"] is x
        assert not hooked._hooked.runtime.slots
        assert not hooked._hooked.runtime.leaves


def test_an_error_of_the_model_gives_the_caller_its_input_back(net: nn.Sequential) -> None:
    one = TensorDict({"input": torch.randn(5, 7)}, batch_size=5)
    x = one["input"]
    with Saliency().prepare(net) as hooked, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hooked(one)
    assert one["input"] is x


def test_statistics_of_a_training_batch_move_once() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    plain.load_state_dict(net.state_dict())
    one = data(5)
    expected = plain(one["input"])
    with Saliency().prepare(net) as hooked:
        found = hooked(one.clone())
    assert torch.equal(found["output"], expected)
    assert int(net[1].num_batches_tracked) == 1
    assert torch.equal(net[1].running_mean, plain[1].running_mean)
