"""Chains of known layers: explained without a graph, with the numbers and bits that autograd gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.calls.chains import Record
from tdhook_rl.calls.layers import LAYERS
from tdhook_rl.errors import TargetError
from tdhook_rl.targets import LinearTarget, Target
from tests.chains import SQUARES, by_autograd, chain, data, logit

ACTIVATIONS = [kind for kind in LAYERS if LAYERS[kind].stacks and kind is not nn.Linear]


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_bits_of_autograd(kind: type[nn.Module], batch: tuple[int, ...], records: list[Record]) -> None:
    net, one = chain(kind), data(*batch)
    expected = by_autograd(net, one["input"], logit)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = [hooked(one.clone())]
        with torch.no_grad():
            found.append(hooked(one.clone()))
        found.append(hooked.annotate(one))
    assert len(records) == 3
    for each in found:
        assert torch.equal(each["attr", "input"], expected)
    for each in found[:2]:
        assert torch.equal(each["output"], net(one["input"]))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_jacobian_as_oracle(kind: type[nn.Module]) -> None:
    net, x = chain(kind), data(4)["input"]
    jacobian = torch.vmap(torch.func.jacrev(net))(x)
    for index in range(3):
        with Saliency(target=targets.logit(index, "output")).prepare(net) as hooked:
            found = hooked.annotate(TensorDict({"input": x}, batch_size=4))
        torch.testing.assert_close(found["attr", "input"], jacobian[:, index])


def convolutional(*before: nn.Module, flatten: int = -3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    first = before or (nn.Linear(6, 48), nn.Unflatten(-1, (3, 4, 4)))
    convolutions = nn.Sequential(nn.Conv2d(3, 6, 2, **options), nn.Tanh(), nn.Conv2d(6, 4, 1))
    sizes = convolutions(torch.zeros(1, 3, 4, 4)).shape
    return nn.Sequential(*first, convolutions, nn.Flatten(flatten), nn.Linear(sizes.numel(), 3)).double()


#: With convolutions that are known and such that are not.
CONVOLUTIONAL: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "all options": ({"stride": (2, 1), "padding": (1, 2), "dilation": 2, "groups": 3, "bias": False}, True),
    "same": ({"padding": "same"}, False),
    "reflected": ({"padding": 1, "padding_mode": "reflect"}, False),
}


@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions(name: str, batch: tuple[int, ...], records: list[Record]) -> None:
    options, known = CONVOLUTIONAL[name]
    net, one = convolutional(**options), data(*batch)
    expected = by_autograd(net, one["input"], logit)
    methods = [Saliency(target=targets.logit(index, "output"), attribution_key=f"attr{index}") for index in range(3)]
    with Compose(*methods).prepare(net) as hooked:
        with torch.no_grad():
            step = hooked(one.clone())
        assert torch.equal(step["output"], net(one["input"]))
        for found in (step, hooked.annotate(one)):
            assert torch.equal(found["attr1", "input"], expected)
            last = by_autograd(net, one["input"], lambda y: y[..., 2])
            torch.testing.assert_close(found["attr2", "input"], last)
    assert bool(records) is known


def test_what_flattens_behind_planes_is_no_vector(records: list[Record]) -> None:
    """Rows of vectors are handed on by what flattens them; the planes that a layer made of them are not."""
    net, one = convolutional(nn.Flatten(), nn.Linear(6, 48), nn.Unflatten(-1, (3, 4, 4)), flatten=1), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        assert torch.equal(hooked.annotate(one)["attr", "input"], by_autograd(net, one["input"], logit))
    assert len(records) == 1


LINEAR = {
    "default": (None, lambda y: y.sum(-1)),
    "sum": (targets.output_sum(), lambda y: y.sum(-1)),
    "logit": (targets.logit(1, "output"), logit),
    "chosen": (targets.chosen_logit("output"), lambda y: y[..., 2]),
    "value": (targets.state_value("output"), lambda y: y.sum(-1)),
}
OTHERS = {
    "margin": (targets.margin("output"), lambda y: y[..., 2] - y[..., :2].amax(-1)),
    "squares": (SQUARES, lambda y: y.square().sum(-1)),
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_every_target(name: str, records: list[Record]) -> None:
    net, one = chain(), data(5)
    one["action"] = torch.full((5,), 2)
    target, value = (LINEAR | OTHERS)[name]
    expected = by_autograd(net, one["input"], value)
    with Saliency(target=target).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)
    assert len(records) == (2 if name in LINEAR else 0)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
@pytest.mark.parametrize("name", LINEAR)
def test_integrated_gradients_weigh_the_points(name: str, batch: tuple[int, ...], records: list[Record]) -> None:
    net, one = chain(nn.SiLU), data(*batch)
    one["action"] = torch.full(batch, 2)
    target, value = LINEAR[name]
    with IntegratedGradients(target=target, baseline=0.0, n_steps=64).prepare(net) as hooked:
        found = hooked.annotate(one)["attr", "input"]
    change = value(net(one["input"])) - value(net(torch.zeros_like(one["input"])))
    torch.testing.assert_close(found.sum(-1), change)
    assert records


def test_several_targets_of_which_one_is_not_linear() -> None:
    net, one = chain(), data(5)
    method = Saliency(target={"first": targets.logit(1, "output"), "other": SQUARES})
    with method.prepare(net) as hooked:
        found = hooked(one.clone())
    torch.testing.assert_close(found["attr", "first", "input"], by_autograd(net, one["input"], logit))
    expected = by_autograd(net, one["input"], lambda y: y.square().sum(-1))
    torch.testing.assert_close(found["attr", "other", "input"], expected)


class Negative(LinearTarget):
    def __call__(self, run: object) -> Tensor:
        return -super().__call__(run)


class Tripled:
    """Shows the attributes of what it wraps."""

    def __init__(self, inner: Target) -> None:
        self.inner = inner

    def __call__(self, run: object) -> Tensor:
        return 3 * self.inner(run)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inner"], name)


def test_targets_that_resemble_ours() -> None:
    net, one, ours = chain(), data(5), targets.logit(1, "output")
    once = by_autograd(net, one["input"], logit)
    for target, factor in (
        (Negative("negative", ours.function.function), -1),
        (Tripled(ours), 3),
        (Target("tripled", Tripled(ours), reads_inputs=False), 3),
    ):
        with Saliency(target=target).prepare(net) as hooked:
            torch.testing.assert_close(hooked(one.clone())["attr", "input"], factor * once)
            torch.testing.assert_close(hooked.annotate(one)["attr", "input"], factor * once)


def test_a_target_that_reads_the_input_as_well() -> None:
    def weighed(run: object) -> Tensor:
        return (run.outputs["input"].square().sum(-1, keepdim=True) * run.outputs["output"]).sum(-1)

    net, one = chain(), data(5)
    x = one["input"].clone().requires_grad_()
    expected = torch.autograd.grad((x.square().sum(-1, keepdim=True) * net(x)).sum(), x)[0]
    with Saliency(target=Target("weighed", weighed)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        net = chain()
    one = data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, torch.no_grad():
        found = [hooked(one.clone()), hooked.annotate(one)]
    for each in found:
        torch.testing.assert_close(
            each["attr", "input"], by_autograd(copy.deepcopy(net).requires_grad_(False), one["input"], logit)
        )


def test_a_target_that_no_gradient_reaches() -> None:
    other = torch.ones(5, requires_grad=True)
    unreached = {
        "rounded": lambda run: run.outputs["output"].detach().sum(-1),
        "of another": lambda run: other * run.outputs["output"].detach().sum(-1),
    }
    for name, function in unreached.items():
        for reads_inputs in (True, False):
            target = Target(name, function, reads_inputs)
            hooked = Saliency(target=target).prepare(chain(), return_context=False)
            with pytest.raises(TargetError, match=f"no gradient reaches the target {name}"):
                hooked(data(5))


def test_rows_without_a_target_have_no_gradient() -> None:
    net, one = chain(nn.ReLU), data(5)
    one["input"][2] = torch.inf
    for target in (targets.logit(1, "output"), SQUARES):
        with Saliency(target=target).prepare(net) as hooked:
            found = hooked(one.clone())["attr", "input"]
        assert found[2].isnan().all()
        assert found[[0, 1, 3, 4]].isfinite().all()
    one = data(50)
    finite = net(one["input"])[..., 1] > 0
    assert 0 < finite.sum() < 50
    log = Target("log", lambda run: run.outputs["output"][..., 1].log(), reads_inputs=False)
    with Saliency(target=log).prepare(net) as hooked:
        found = hooked(one)["attr", "input"]
    assert torch.equal(found.isfinite().all(-1), finite)


def test_callers_train_through_the_outputs() -> None:
    net, one = chain(), data(5)
    with Saliency().prepare(net) as hooked:
        found = hooked(one)
        found["output"].square().sum().backward()
    assert not found["attr", "input"].requires_grad
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(one["input"]).square().sum().backward()
    for ours, theirs in zip(gradients, net.parameters(), strict=True):
        assert torch.equal(ours, theirs.grad)


def test_targets_that_differentiate() -> None:
    def sensitivity(run: object) -> Tensor:
        y, x = run.outputs["output"], run.outputs["input"]
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(-1)

    net, one = chain(), data(5)
    x = one["input"].clone().requires_grad_()
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad(slope.square().sum(), x)[0]
    with Saliency(target=Target("sensitivity", sensitivity)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


@pytest.mark.parametrize("reads_inputs", [False, True])
def test_targets_that_mask_in_place(reads_inputs: bool) -> None:
    def masked(run: object) -> Tensor:
        y = run.outputs["output"]
        y[:, 0] = -torch.inf
        return y.log_softmax(-1)[:, 1]

    net, one = chain(), data(5)
    expected = by_autograd(net, one["input"], lambda y: y[:, 1:].log_softmax(-1)[:, 0])
    with Saliency(target=Target("masked", masked, reads_inputs)).prepare(net) as hooked:
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_sums_that_overflow_in_half_precision() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    with torch.no_grad():
        net[0].weight.copy_(200 * torch.eye(2))
    rows = TensorDict({"input": torch.tensor([[200.0, 200.0], [-200.0, -200.0], [1.0, 1.0]]).half()}, batch_size=3)
    with Saliency(target=targets.output_sum()).prepare(net) as hooked:
        found = hooked.annotate(rows)["attr", "input"]
    assert found.isnan().all(-1).tolist() == [True, True, False]
