"""What steering keeps from call to call is used only where it is what would be computed anew."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MultiAgentConvNet, MultiAgentMLP

from tdhook_rl import SteeringVectors
from tdhook_rl.errors import InactiveError, InputError
from tests.policies import POLICIES, Case
from tests.steered_by_hand import acting, by_case

CONTROL, ALPHA = "steering.{}", "steering.alpha"
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

#: What happens between two calls: it is given the hooked policy, the path and how many calls there were.
EVENTS: dict[str, Callable[[nn.Module, str, int], None]] = {
    "nothing": lambda hooked, path, calls: None,
    "another strength": lambda hooked, path, calls: hooked.controls.update_({ALPHA: 0.3 * calls}),
    "no strength": lambda hooked, path, calls: hooked.controls.update_({ALPHA: -0.0 if calls % 2 else 0.0}),
    "another vector": lambda hooked, path, calls: hooked.controls.update_(
        {CONTROL.format(path): hooked.controls[CONTROL.format(path)].roll(1, 0) * 1.5}
    ),
    "one number in place": lambda hooked, path, calls: hooked.controls[CONTROL.format(path)].view(-1)[-1:].add_(1),
    "strength in place": lambda hooked, path, calls: hooked.controls[ALPHA].fill_(1.0 + calls),
}


def in_turn(hooked: nn.Module, path: str, fresh: Callable[[], nn.Module], data: list[TensorDict]) -> None:
    """Call it twice between all events, on batches in turn, beside one that was prepared just then."""
    calls = 0
    for event in [*EVENTS.values(), *reversed(EVENTS.values())]:
        event(hooked, path, calls)
        for rows in data:
            for _ in range(2):
                calls += 1
                other = fresh()
                for name in hooked.controls:
                    other.controls[name] = hooked.controls[name]
                found, expected = acting(hooked, rows), acting(other, rows)
                for key in expected.keys(True, True):
                    assert same_bits(found[key], expected[key]), key


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@by_case
def test_every_call_is_steered_as_the_first_one(case: Case, batch: tuple[int, ...]) -> None:
    policy = case.build()
    sizes = [batch, (*batch[:-1], 7)] if batch else [batch]
    if case in [POLICIES[name] for name in ("batch_norm", "batch_norm_eval", "bytes")]:
        sizes = [(5,), (7,)]
    width = case.features[0 if len(case.features) == 3 else -1]  # channels of maps, one vector for all agents
    method = SteeringVectors({case.site: torch.linspace(-1, 1, width)}, alpha=0.5)

    def fresh() -> nn.Module:
        return method.prepare(copy.deepcopy(policy), return_context=False)

    with torch.no_grad():
        in_turn(fresh(), case.site, fresh, [case.data(*size) for size in sizes])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_numbers_of_every_kind(mode: type[AbstractContextManager], dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    vector = torch.linspace(-1, 1, 6).to(dtype)
    data = [TensorDict({"input": torch.randn(rows, 4, dtype=dtype)}, [rows]) for rows in (3, 6, 1)]

    def fresh() -> nn.Module:
        return SteeringVectors({"0": vector}, alpha=0.5).prepare(copy.deepcopy(net), return_context=False)

    with mode():
        in_turn(fresh(), "0", fresh, data)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_agents_in_rows_and_hidden_ones(conv: bool, each: bool) -> None:
    if conv:
        net: nn.Module = MultiAgentConvNet(3, False, True, in_features=2, num_cells=[6], kernel_sizes=2, strides=1)
    else:
        net = MultiAgentMLP(4, 2, n_agents=3, centralized=False, share_params=True, depth=1, num_cells=6)
    policy = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    path = next(name for name, module in policy.named_modules() if isinstance(module, (nn.Tanh, nn.ELU)))
    shape = (3, 2, 4, 4) if conv else (3, 4)
    data = [TensorDict({"observation": torch.randn(*batch, *shape)}, batch) for batch in ((3,), (3, 3), (5,))]
    vector = torch.linspace(-1, 1, 18).reshape(3, 6) if each else torch.linspace(-1, 1, 6)
    vector = vector[..., None, None] if conv and each else vector

    def fresh() -> nn.Module:
        return SteeringVectors({path: vector}).prepare(copy.deepcopy(policy), return_context=False)

    with torch.no_grad():
        in_turn(fresh(), path, fresh, data)


class Any2d(nn.Module):
    """A convolution, and an activation of which nothing says where its features are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x if x.ndim < 4 else self.conv(x))


@pytest.mark.parametrize("first", [0, 1])
def test_what_does_not_fit_is_refused_after_what_did(first: int) -> None:
    fits = TensorDict({"x": torch.randn(4, 4, 5, 5)}, [4])
    wrong = (TensorDict({"x": torch.randn(4, 4, 5, 5)}, [4, 4]), TensorDict({"x": torch.randn(4, 1)}, [4]))[first]
    with SteeringVectors({"act": torch.ones(4, 1, 1)}).prepare(Any2d(), in_keys=["x"], out_keys=["y"]) as hooked:
        for _ in range(2):
            hooked(fits.clone())
        with pytest.raises(InputError, match="steering vector"):
            hooked(wrong.clone())


def test_an_input_of_another_dtype_is_another_call() -> None:
    net = nn.Sequential(nn.Identity())
    vector = torch.tensor([0.1, 0.7, -0.3])
    with SteeringVectors({"0": vector}, alpha=0.3).prepare(net) as hooked:
        for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32):
            x = torch.randn(5, 3, dtype=dtype)
            for _ in range(2):
                found = hooked(TensorDict({"input": x}, [5]))["output"]
                assert found.dtype is dtype
                assert torch.equal(found, x + torch.tensor(0.3).to(dtype) * vector.to(dtype))
        hooked.controls[ALPHA] = 0.0
        for _ in range(3):
            assert hooked(TensorDict({"input": torch.full((5, 3), -0.0)}, [5]))["output"].signbit().all()


def test_a_policy_with_compiled_functions_is_looked_at_in_every_call() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    net.unused = torch.compile(torch.sin)
    with SteeringVectors({"0": torch.ones(3)}).prepare(net) as hooked:
        assert hooked._hooked.runtime.unhooked
        for _ in range(3):  # the site is seen to run in each
            hooked(TensorDict({"input": torch.randn(5, 4)}, [5]))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev"])
def test_calls_within_transforms_and_without_in_turn(transform: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    vector, rows = torch.linspace(-1, 1, 6), torch.randn(6, 6, 4)

    def plain(x: Tensor) -> Tensor:
        return net[1:](net[0](x) + 0.5 * vector)

    with SteeringVectors({"0": vector}, alpha=0.5).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        with torch.inference_mode():
            hooked(TensorDict({"x": rows[0]}, batch_size=[6]))

        def steered(x: Tensor) -> Tensor:
            return hooked(TensorDict({"x": x}, batch_size=x.shape[:-1]))["y"]

        def through(function: Callable[[Tensor], Tensor]) -> Tensor:
            if transform == "vmap":
                return torch.vmap(function)(rows)
            if transform == "grad":
                return torch.func.grad(lambda x: function(x).sum())(rows[0])
            return torch.func.jacrev(function)(rows[0])

        for _ in range(3):
            torch.testing.assert_close(through(steered), through(plain))
            torch.testing.assert_close(steered(rows[0]), plain(rows[0]))
            torch.testing.assert_close(steered(rows), plain(rows))


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("name", ["steering.0", ALPHA])
def test_gradients_reach_a_control_that_asks_for_them(name: str, calls: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with SteeringVectors({"0": torch.ones(6)}, alpha=0.5).prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        data = TensorDict({"x": torch.randn(3, 4)}, [3])
        for _ in range(calls):
            expected = hooked(data.clone())["y"]
        control = hooked.controls[name].requires_grad_()
        for _ in range(2):
            control.grad = None
            hooked(data.clone())["y"].sum().backward()
            by_feature = 3 * net[1].weight.sum(0)
            torch.testing.assert_close(control.grad, by_feature.sum() if name == ALPHA else 0.5 * by_feature)
        control.requires_grad_(False)
        for _ in range(2):
            found = hooked(data.clone())["y"]
            assert calls == 0 or torch.equal(found, expected)
            found.sum().backward()


def test_copies_keep_nothing_of_this_process_and_the_end_is_the_end() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    data = TensorDict({"input": torch.randn(3, 4)}, [3])
    with SteeringVectors({"0": torch.ones(6)}, alpha=0.5).prepare(net) as hooked:
        for _ in range(2):
            found = hooked(data.clone())["output"]
        for other in (pickle.loads(pickle.dumps(hooked)), copy.deepcopy(hooked)):
            for _ in range(2):
                assert torch.equal(other(data.clone())["output"], found)
            other.controls[ALPHA] = 2.0
            assert not torch.equal(other(data.clone())["output"], found)
            other.controls[ALPHA] = 0.5
        for _ in range(2):
            hooked.module(data["input"])
    with pytest.raises(InactiveError):
        hooked(data.clone())
    with pytest.raises(InactiveError):
        hooked.module(data["input"])
