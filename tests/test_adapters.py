"""Adapters: against hand computation, with gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Compose, SteeringVectors
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.weights import Adapters
from tests.policies import CASES, HIDDEN, categorical, mlp

CASE = CASES["categorical"]


@pytest.mark.parametrize("source", ["1", "3"])
def test_an_adapter_is_what_it_says_with_its_gradient(source: str) -> None:
    net = mlp().double()
    adapter = nn.Linear(HIDDEN, HIDDEN).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with Adapters({"layers.3.after": (adapter, source, "3")}).prepare(net) as hooked:
        assert [id(p) for p in hooked.parameters()] == [id(p) for p in net.parameters()]
        assert list(hooked.state_dict()) == [f"module.{name}" for name in net.state_dict()]
        found = hooked(TensorDict({"input": x}, batch_size=5))["output"]
        found.square().sum().backward()
    given = net[:2](x) if source == "1" else net[:4](x)
    expected = net[4](given @ adapter.weight.T + adapter.bias)
    gradient = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for parameter, answer in zip(adapter.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad, answer, rtol=0, atol=1e-11)


def test_adapters_train_through_get_dist_and_log_prob() -> None:
    actor = categorical()
    data = actor(CASE.data(8)).detach()
    adapter = nn.Linear(HIDDEN, HIDDEN)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for source in (CASE.site, "module.0.module.3"):
        with Adapters({"a": (adapter, source, "module.0.module.3")}).prepare(actor) as hooked:
            losses = []
            for _ in range(20):
                loss = -hooked.log_prob(data.clone()).mean()
                torch.testing.assert_close(loss, -hooked.get_dist(data.clone()).log_prob(data["action"]).mean())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert losses[-1] < losses[0]
            assert all(route.value is None for route in hooked._hooked.routes)


def test_copies_go_on_with_the_same_adapter() -> None:
    adapter, net = nn.Linear(HIDDEN, HIDDEN), mlp()
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with Adapters({"m": (adapter, "1", "3"), "l": (lambda x: 2 * x, "4", "4")}).prepare(net) as hooked:
        twin, travelled = copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))
        before = hooked(data.clone())["output"]
        torch.testing.assert_close(before, 2 * net[4](adapter(net[:2](data["input"]))))
        assert torch.equal(travelled(data.clone())["output"], before)
        with torch.no_grad():
            adapter.weight.zero_()
        assert torch.equal(twin(data.clone())["output"], hooked(data.clone())["output"])
        assert not torch.equal(twin(data.clone())["output"], before)


def test_the_source_is_kept_from_in_place_changes_and_is_dropped_on_errors() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(4, 6)
    with Adapters({"skip": (torch.sin, "0", "2")}).prepare(net) as hooked:
        torch.testing.assert_close(hooked(input=x), net[3](torch.sin(net[0](x))))

    def fail(module_key: str, output: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    actor = categorical()
    failing = SteeringVectors(modules_to_steer=["module.0.module.2"], steer_fn=fail)
    with Compose(Adapters({"a": (torch.sin, CASE.site, "module.0.module.3")}), failing).prepare(actor) as hooked:
        for call in (hooked, hooked.get_dist):
            with pytest.raises(ZeroDivisionError):
                call(CASE.data(3))
            assert [route.value for route in hooked._hooked.routes] == [None]


def test_bad_adapters_are_refused() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)

    def call(*adapter: object, module: nn.Module = net) -> None:
        with Adapters({"a.b": adapter}).prepare(module) as hooked:
            hooked(data.clone())

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(InputError, match=r"adapters\['a\.b'\] must be \(adapter, source path, target path\)"):
        call(torch.sin, "1")
    with pytest.raises(InputError, match="callable first"):
        call("1", "1", "3")
    with pytest.raises(InputError, match=r"takes \{name"):
        Adapters({})
    with pytest.raises(SiteError, match="no submodule of Sequential matches 'nine'; nearest"):
        call(torch.sin, "nine", "3")
    with pytest.raises(SiteError, match="names 3 modules"):
        call(torch.sin, "1", "[1:4]")
    with pytest.raises(SiteError, match=r"'a\.b': the source '3' did not run before the target '1'"):
        call(torch.sin, "3", "1")
    with pytest.raises(SiteError, match="had no effect: the source 'used' ran, but the target 'unused'"):
        call(torch.sin, "used", "unused", module=Partial())
    with pytest.raises(InputError, match=r"shape \(3, 16\), that of the output of '1', got shape \(3, 4\)"):
        call(nn.Linear(HIDDEN, 4), "1", "1")
    with pytest.raises(InputError, match="got a tuple"):
        call(lambda x: (x, x), "1", "3")
