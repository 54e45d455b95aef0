"""Saliency explains the policy's own forward where that records a graph anyway, and a second pass elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import MultiAgentMLP

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.errors import TargetError
from tdhook_rl.replaying.scratch import LOOKS


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


def look(hooked: nn.Module, data: TensorDict) -> None:
    """Calls after which it is known of a class of the user's that its forward keeps nothing of what it is given."""
    for _ in range(LOOKS):
        hooked(data.clone())
    Counting.calls = 0


def data(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 6)}, batch_size=batch)


def test_one_pass_with_gradients_on_and_two_without(net: nn.Sequential) -> None:
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        one = data(5)
        look(hooked, one)
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
        look(hooked, one)
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


class Centred(nn.Module):
    """Subtracts a running mean of its inputs, which it holds, or keeps, as tensors or in an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.net = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.mean.mul_(0.9).add_(0.1 * x.reshape(-1, 6).mean(0))
        elif self.how == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * x.reshape(-1, 6).mean(0)
        elif self.how == "list":
            self.last.append(x)
        elif self.training:  # in a mode that comes later
            self.mean = 0.9 * self.mean + 0.1 * x.reshape(-1, 6).mean(0)
        return self.net(x - self.mean)


@pytest.mark.parametrize("how", ["in place", "replaced", "list", "in training"])
def test_what_a_forward_keeps_of_its_inputs_has_no_graph_of_ours(how: str) -> None:
    policy = Centred(how).eval()
    twin, one = copy.deepcopy(policy), data(5)
    with Saliency().prepare(policy) as hooked:
        for training in (False, True):
            for _ in range(LOOKS + 1):
                for module in (policy, twin, hooked):
                    module.train(training)
                found, expected = hooked(one.clone()), twin(one["input"])
                assert torch.equal(found["output"], expected)
                through = 1 if how == "list" or (how == "in training" and not training) else 0.9  # of the mean as well
                torch.testing.assert_close(found["attr", "input"], through * twin.net.weight.sum(0).expand(5, 6))
                kept = [hooked.module.mean, policy.mean, *hooked.module.last]
                assert not any(tensor.requires_grad for tensor in kept)


class Transposed(nn.Module):
    """A product for which torch takes another kernel where its input asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda weight: (x @ weight).sin(), out_dims=-2)(self.weight).sum(-2)


BITS = {
    "agents apart": lambda: MultiAgentMLP(6, 2, 3, centralized=False, share_params=False, depth=1, num_cells=8),
    "agents apart who see all": lambda: MultiAgentMLP(
        6, 2, 3, centralized=True, share_params=False, depth=1, num_cells=8
    ),
    "agents alike": lambda: MultiAgentMLP(6, 2, 3, centralized=True, share_params=True, depth=1, num_cells=8),
    "an ensemble of the user's": Transposed,
}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_the_outputs_are_the_same_to_the_bit(name: str, batch: tuple) -> None:
    net = BITS[name]()
    x = torch.randn(*batch, 3, 6)
    expected = net(x)
    with Saliency().prepare(net) as hooked:
        with torch.no_grad():
            for _ in range(LOOKS):
                hooked(TensorDict({"input": x}, batch_size=batch))
        for _ in range(LOOKS):
            assert torch.equal(hooked(TensorDict({"input": x}, batch_size=batch))["output"], expected)
