"""Runs: capture, override, stop and gradients of single modules; the low-level workflow of the seed page."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import ActivationCaching, Compose, HookedModule, Saliency, SteeringVectors
from tdhook_rl.errors import InactiveError, InputError, SiteError, TargetError
from tdhook_rl.runs.run import EarlyStop
from tests.policies import CASES, FEATURES, HIDDEN, categorical, mlp

F64 = torch.float64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attn(x).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_workflow_3_of_the_seed() -> None:
    net, override_tensor = Net(), torch.randn(3, 4)
    data = TensorDict({"input": torch.randn(3, 4)}, batch_size=3)
    hooked_module = HookedModule.from_module(net)
    with hooked_module.run(data, grad_enabled=True) as run:
        run.save("layers.5.mlp")
        run.set("layers.5.attn", override_tensor)
    cached = run.get("layers.5.mlp", cache_key="my_key").resolve()
    expected = net.layers[5].mlp(override_tensor.tanh())
    torch.testing.assert_close(cached, expected)
    torch.testing.assert_close(data["output"], expected)
    assert data["output"].requires_grad


def test_names_of_what_is_saved_and_caches_of_the_caller() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    mine = TensorDict()
    hooked = HookedModule.from_module(net)
    with hooked.run(data, cache=mine, run_name="clean", run_sep="/") as run:
        proxy = run.save("1")
        run.save_input("[-1]")
        other = run.get("0", cache_key="first")
        own = run.get("1", callback=lambda module, output, **_: output.mean(-1))
        with pytest.raises(SiteError, match="has not ended"):
            proxy.resolve()
    assert set(mine.keys()) == {"clean/1_output", "clean/[-1]_input"}
    assert set(run.cache.keys()) == {"first", "1_output"}
    torch.testing.assert_close(proxy.resolve(), net[:2](data["input"]))
    torch.testing.assert_close(mine["clean/[-1]_input"], net[:4](data["input"]))
    torch.testing.assert_close(other.resolve(), net[0](data["input"]))
    torch.testing.assert_close(own.resolve(), net[:2](data["input"]).mean(-1))
    with pytest.raises(SiteError, match=r"was not captured in this run.*nearest"):
        run.get("2")
    with pytest.raises(SiteError, match="belongs inside"):
        run.set("1", torch.zeros(3, HIDDEN))


def test_a_capture_is_routed_into_a_later_module() -> None:
    net = Net().double()
    data = TensorDict({"input": torch.randn(3, 4, dtype=F64)}, batch_size=3)
    hooked = HookedModule.from_module(net)
    with hooked.run(data) as run:
        early = run.get("layers.0.attn")
        run.set("layers.5.attn", early)
        run.set_input("layers.3", torch.zeros(3, 4, dtype=F64))
        run.set("layers.4.mlp", None, callback=lambda module, output, value: output * 2)
        seen = run.get("layers.3.attn")
    torch.testing.assert_close(seen.resolve(), net.layers[3].attn.bias.expand(3, 4))
    expected = net.layers[5].mlp(net.layers[0].attn(data["input"]).tanh())
    torch.testing.assert_close(data["output"], expected)


def test_an_early_stop_runs_nothing_later() -> None:
    seen = []
    net = mlp()
    net.append(nn.Identity())
    net[-1].register_forward_hook(lambda *_: seen.append(1))
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    hooked = HookedModule.from_module(net)
    with hooked.run(data) as run:
        proxy = run.save("1")
        run.stop("2")
    assert run.stopped_at == "2"
    assert not seen
    assert "output" not in data.keys()
    torch.testing.assert_close(proxy.resolve(), net[:2](data["input"]))
    hooked(data)
    assert seen
    with pytest.raises(TargetError, match="stopped at 2"):
        with hooked.run(data, target=lambda d: d["output"]) as run:
            run.stop("2")


@pytest.mark.parametrize("way", ["target", "callback"])
def test_gradients_of_inputs_and_outputs(way: str) -> None:
    net = mlp().double()
    data = TensorDict({"input": torch.randn(3, FEATURES, dtype=F64)}, batch_size=3)
    hooked = HookedModule.from_module(net)
    options = {"target": lambda d: d["output"][:, 1]}
    if way == "callback":
        options = {"run_callback": lambda module, d: module(d)["output"][:, 1].sum().backward()}
    with hooked.run(data, **options) as run:
        at_input, at_output = run.save_grad("2"), run.save_grad_output("2")
    hidden = net[:2](data["input"]).detach().requires_grad_()
    middle = net[2](hidden)
    total = net[3:](middle)[:, 1].sum()
    expected_input, expected_output = torch.autograd.grad(total, (hidden, middle))
    torch.testing.assert_close(at_input.resolve(), expected_input)
    torch.testing.assert_close(at_output.resolve(), expected_output)
    assert (net[0].weight.grad is None) == (way == "target")


def test_a_gradient_is_overridden_on_its_way_back() -> None:
    net = mlp().double()
    data = TensorDict({"input": torch.randn(3, FEATURES, dtype=F64)}, batch_size=3)
    hooked = HookedModule.from_module(net)
    ones = torch.ones(3, HIDDEN, dtype=F64)
    with hooked.run(data, target=lambda d: d["output"]) as run:
        run.set_grad_output("2", ones)
        found = run.get_grad("2")
    torch.testing.assert_close(found.resolve(), ones @ net[2].weight)
    with hooked.run(data, target=lambda d: d["output"]) as run:
        run.set_grad("2", 2 * ones)
        found = run.get_grad_output("0")
    slope = 1 - net[:2](data["input"]) ** 2
    torch.testing.assert_close(found.resolve(), 2 * slope)


def test_the_model_does_not_run_when_the_body_raised() -> None:
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    hooked = HookedModule.from_module(mlp())
    hooks = sum(len(module._forward_hooks) for module in hooked.modules())

    def fail() -> None:
        with hooked.run(data) as run:
            run.save("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "output" not in data.keys()
    assert sum(len(module._forward_hooks) for module in hooked.modules()) == hooks


def test_runs_see_interventions_and_leave_observers_out() -> None:
    case = CASES["categorical"]
    actor = categorical()
    method = Compose(
        SteeringVectors({case.site: torch.ones(HIDDEN)}), ActivationCaching(case.site), Saliency(when="step")
    )
    data = case.data(3)
    with method.prepare(actor) as hooked:
        run_data = data.clone()
        with hooked.run(run_data) as run:
            proxy = run.save(case.site)
        plain = actor.module[0].module[:2](data["observation"])
        torch.testing.assert_close(proxy.resolve(), plain + 1)
        assert "cache" not in run_data.keys()
        assert "cache" in hooked(data.clone()).keys()
        with hooked.disable_context_hooks() as bare:
            found = bare(data.clone())
            torch.testing.assert_close(found["logits"], actor(data.clone())["logits"])
            assert "cache" not in found.keys()
        assert not torch.allclose(hooked(data.clone())["logits"], found["logits"])
        with hooked.disable_context() as original:
            assert original is actor
    with pytest.raises(InactiveError):
        hooked.run(data)
    kept = method.prepare(actor, return_context=False)
    kept.restore()
    with pytest.raises(InactiveError):
        kept(data)


def test_requests_directly_on_the_hooked_module() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    hooked, cache = HookedModule.from_module(net), TensorDict()
    handle = hooked.set("1", torch.zeros(3, HIDDEN))
    reader, proxy = hooked.get(cache, "2")
    hooked(data.clone())
    torch.testing.assert_close(proxy.resolve(), net[2].bias.expand(3, -1))
    handle.remove()
    reader.remove()
    assert torch.equal(hooked(data.clone())["output"], net(data["input"]))
    stopper = hooked.stop("1")
    with pytest.raises(EarlyStop):
        hooked(data.clone())
    stopper.remove()
    hooked(data.clone())


def test_bad_requests_are_refused() -> None:
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    hooked = HookedModule.from_module(mlp())
    with hooked.run(data) as run:
        with pytest.raises(SiteError, match="nearest"):
            run.save("9")
        with pytest.raises(SiteError):
            run.save("__class__")
        with pytest.raises(InputError, match="nearest: 'fwd"):
            run.get("1", direction="forward")
        run.save("module.1", relative=False)
    with pytest.raises(InputError, match=r"has shape \(3, 16\), it cannot be set to \(2,\)"):
        with hooked.run(data) as run:
            run.set("1", torch.zeros(2))
    with pytest.raises(TargetError, match="no tensor with a gradient path"):
        with hooked.run(data, target=lambda d: d["output"].detach()) as run:
            run.save_grad("1")
