"""What interventions draw and write in their hooks: passes see the noise and the state of the step, and leave both."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Adapters, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.method import Binder, Method

F64 = torch.float64
WIDTH = 7


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.layer = 0, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) / self.calls


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += x.detach().reshape(-1, WIDTH).mean(0)
        return x + self.mean


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Linear(WIDTH, WIDTH),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "counter": Counting,
    "buffer": Remembering,
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda rows: rows + torch.randn_like(rows),
    "functional dropout": lambda rows: F.dropout(rows, 0.5),
    "random": lambda rows: rows * random.random(),
    "NumPy": lambda rows: rows * np.random.rand(),
}


class Intervening(Method):
    """A method of one's own with a function."""

    observes = False

    def __init__(self, path: str, function: Callable[[Tensor], Tensor]) -> None:
        self.path, self.function = path, function

    def bind(self, binder: Binder) -> None:
        binder.intervene(self.path, self.function)


class Own(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 3)).to(F64)


def policy_of(kind: str, net: nn.Sequential) -> tuple[TensorDictModule, str]:
    """A policy around layers, and the path of the second of them."""
    module = TensorDictModule(Own(net) if kind == "own" else net, ["observation"], ["logits"])
    if kind == "actor":
        return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical), "module.0.module.1"
    return module, "module.layers.1" if kind == "own" else "module.1"


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def drawn_next() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def by_hand(net: nn.Sequential, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return net[2:](change(net[:2](x)))


def gradient(net: nn.Sequential, change: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(by_hand(net, change, leaf)[..., 1].sum(), leaf)[0]


def loop(net: nn.Sequential, change: Any, x: Tensor) -> Tensor:
    values = []
    for feature in (None, *range(4)):
        seed()
        seen = x if feature is None else x * (torch.arange(4) != feature)
        values.append(by_hand(net, copy.deepcopy(change), seen)[..., 1].detach())
    return torch.stack([values[0] - value for value in values[1:]], -1)


def path(net: nn.Sequential, change: Any, x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for point, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        seed()
        found += weight / 2 * gradient(net, copy.deepcopy(change), x * (point + 1) / 2)
    return found * x


TARGET = targets.logit(1)
METHODS: dict[str, tuple[Callable[[], Method], Callable[..., Tensor]]] = {
    "saliency": (lambda: Saliency(target=TARGET, when="step"), gradient),
    "path": (lambda: IntegratedGradients(target=TARGET, baseline=0.0, when="step", n_steps=8), path),
    "loop": (lambda: Occlusion(target=TARGET, baseline=0.0, when="step"), loop),
    "two": (
        lambda: Compose(
            Saliency(target=targets.logit(0), when="step", attribution_key="other"),
            Saliency(target=TARGET, when="step"),
        ),
        gradient,
    ),
}


@pytest.mark.filterwarnings("ignore:rows of a batch share its statistics")
@pytest.mark.parametrize("does", [*ADAPTERS, *FUNCTIONS, "a method of one's own"])
@pytest.mark.parametrize("policy", ["chain", "own", "actor"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_step_is_explained_by_what_its_interventions_drew_and_held(
    does: str, policy: str, method: str, guard: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    net = layers()
    plain, site = policy_of(policy, net)
    if does in ADAPTERS:
        change: Any = ADAPTERS[does]().to(F64)
        twin = copy.deepcopy(change)
        intervention: Method = Adapters({"adapter": (change, site, site)})
    else:
        change = twin = FUNCTIONS.get(does, FUNCTIONS["noise"])
        intervention = SteeringVectors(modules_to_steer=[site], steer_fn=lambda module_key, output: change(output))
        if does not in FUNCTIONS:
            intervention = Intervening(site, change)
    make, right = METHODS[method]
    with guard(), Compose(intervention, make()).prepare(plain) as hooked:
        for _ in range(3):
            with torch.inference_mode(False):
                x = torch.randn(6, 4, dtype=F64)
            seed()
            found = hooked(TensorDict({"observation": x.clone()}, [6]))
            after = drawn_next()
            with torch.inference_mode(False), torch.enable_grad():
                seed()
                expected = right(net, copy.deepcopy(twin), x)
                seed()
                logits = by_hand(net, twin, x)
                expected_after = drawn_next()
            torch.testing.assert_close(found["logits"], logits.detach(), rtol=0, atol=0)
            torch.testing.assert_close(found["attr", "observation"], expected, check_dtype=False)
            assert after == expected_after
    if isinstance(change, nn.Module):
        torch.testing.assert_close(change.state_dict(), twin.state_dict())
        assert getattr(change, "calls", 0) == getattr(twin, "calls", 0)


@pytest.mark.parametrize("does", ADAPTERS)
@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_annotate_leaves_what_adapters_hold(does: str, batch: tuple[int, ...]) -> None:
    if does == "batch norm" and len(batch) > 1:
        pytest.skip("it takes rows")
    adapter = ADAPTERS[does]().to(F64)
    plain, site = policy_of("chain", layers())
    method = Compose(Adapters({"adapter": (adapter, site, site)}), Saliency(target=TARGET, when="batch"))
    with method.prepare(plain) as hooked:
        data = hooked(TensorDict({"observation": torch.randn(*batch, 4, dtype=F64)}, batch))
        held, calls = copy.deepcopy(adapter.state_dict()), getattr(adapter, "calls", 0)
        hooked.annotate(data, on_mismatch="ignore")
    torch.testing.assert_close(adapter.state_dict(), held)
    assert getattr(adapter, "calls", 0) == calls


@pytest.mark.parametrize("policy", ["chain", "own", "actor"])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_results_are_of_the_adapter_as_it_is_now(policy: str, when: str) -> None:
    net, adapter = layers(), nn.Linear(WIDTH, WIDTH, dtype=F64)
    plain, site = policy_of(policy, net)
    method = Compose(Adapters({"adapter": (adapter, site, site)}), Saliency(target=TARGET, when=when))
    x = torch.randn(6, 4, dtype=F64)
    with method.prepare(plain) as hooked:
        data = hooked.annotate(hooked(TensorDict({"observation": x}, [6])))
        same = data.clone()
        same["attr", "observation"].fill_(7.0)
        assert bool((hooked.annotate(same)["attr", "observation"] == 7).all())
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.5)
        by_hand(net, adapter, x).sum().backward()
        optimizer.step()
        again = hooked.annotate(data, on_mismatch="ignore")
    torch.testing.assert_close(again["attr", "observation"], gradient(net, adapter, x))
