"""Calls that are made of a call (on copies, of other inputs): their passes start where those of the call do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchrl.modules import IndependentNormal, ProbabilisticActor

from tdhook_rl import Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.method import Binder, BoundMethod, Method

F64 = torch.float64
FEATURES = 4


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy().copy())


def dropout(net: Remembering, x: Tensor) -> Tensor:
    return F.dropout(x, 0.4) + by_numpy(x)


def module(net: Remembering, x: Tensor) -> Tensor:
    return checkpoint(net.inner, net.drop(x), use_reentrant=False)


def noise(net: Remembering, x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + checkpoint(torch.tanh, x, use_reentrant=False)


def counter(net: Remembering, x: Tensor) -> Tensor:
    net.calls += 1
    return x / net.calls + by_numpy(x)


def buffer(net: Remembering, x: Tensor) -> Tensor:
    net.mean += by_numpy(x).reshape(-1, FEATURES).mean(0)
    return x * net.mean


def array(net: Remembering, x: Tensor) -> Tensor:
    net.array += x.detach().numpy().reshape(-1, FEATURES).mean(0)
    return x * torch.from_numpy(net.array.copy())


def data_of_a_parameter(net: Remembering, x: Tensor) -> Tensor:
    net.gain.data = net.gain.data * 0.9 + x.detach().reshape(-1, FEATURES).mean(0)
    return x * (1 + net.gain)


DOES: dict[str, Callable[..., Tensor]] = {
    one.__name__: one for one in (dropout, module, noise, counter, buffer, array, data_of_a_parameter)
}


class Remembering(nn.Module):
    """Draws noise or writes state in its forward, and does what autograd differentiates and functorch does not."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does, self.calls, self.array = does, 0, np.zeros(FEATURES)
        self.inner, self.drop = nn.Linear(FEATURES, FEATURES), nn.Dropout(0.4)
        self.outer = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 3))
        self.gain = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(DOES[self.does](self, x))


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf)[..., 0].sum(), leaf)[0]


def integral(net: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Integrated gradients from zero by Gauss and Legendre, each point with the state and the noise of the first."""
    found, state = torch.zeros_like(x), torch.get_rng_state()
    for point, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        torch.set_rng_state(state)
        found += weight / 2 * gradient(copy.deepcopy(net), x * (point + 1) / 2)
    return found * x


LOGIT = targets.logit(0)
METHODS = {
    "saliency": lambda: Saliency(target=LOGIT, when="step"),
    "integrated": lambda: IntegratedGradients(target=LOGIT, baseline=0.0, when="step", n_steps=6),
    "two": lambda: Compose(
        Saliency(target=targets.logit(1), when="step", attribution_key="other"), Saliency(target=LOGIT, when="step")
    ),
}


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("does", DOES)
def test_state_and_noise_of_a_step_are_its_own_where_functorch_fails(
    does: str, method: str, batch: tuple[int, ...], guard: type
) -> None:
    torch.manual_seed(0)
    net = Remembering(does).to(F64)
    twin = copy.deepcopy(net)
    with METHODS[method]().prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked, guard():
        for step in range(3):
            x = torch.randn(*batch, FEATURES, dtype=F64)
            torch.manual_seed(step)
            found = hooked(TensorDict({"observation": x.clone()}, batch))
            with torch.inference_mode(False), torch.enable_grad():
                torch.manual_seed(step)
                before = copy.deepcopy(twin)
                right = integral(before, x.clone(), 6) if method == "integrated" else gradient(before, x.clone())
            torch.manual_seed(step)
            twin(x.clone())
            torch.testing.assert_close(found["attr", "observation"], right)


@dataclass(frozen=True, eq=False)
class Beside(Method):
    """The saliency half a unit beside what the policy saw."""

    saliency: Saliency

    def bind(self, binder: Binder) -> BoundMethod:
        return BoundBeside(self.saliency.bind(binder))


class BoundBeside(BoundMethod):
    replays = True

    def __init__(self, bound: BoundMethod) -> None:
        self.bound = bound
        self.when, self.reads, self.result_keys = bound.when, bound.reads, bound.result_keys

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        return self.bound.compute(call.given({"observation": call.inputs["observation"] + 0.5}))


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 + FEATURES, 3, dtype=F64)

    def forward(self, latent: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.cat([latent, x], -1).tanh())


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_other_inputs_keep_the_noise_of_stored_latents(when: str, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encode = nn.Sequential(nn.Linear(FEATURES, 8, dtype=F64), NormalParamExtractor())
    decide = Decides()
    policy = TensorDictSequential(
        TensorDictModule(encode, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["latent"], distribution_class=IndependentNormal, default_interaction_type="random"
        ),
        ProbabilisticActor(
            TensorDictModule(decide, ["latent", "observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=Categorical,
        ),
    )
    x = torch.randn(*batch, FEATURES, dtype=F64)
    with Beside(Saliency(target=LOGIT, when=when)).prepare(policy) as hooked:
        found = hooked.annotate(hooked(TensorDict({"observation": x}, batch)))
    noise = ((found["latent"] - found["loc"]) / found["scale"]).detach()
    leaf = (x + 0.5).requires_grad_()
    loc, scale = encode(leaf)
    (right,) = torch.autograd.grad(decide(loc + scale * noise, leaf)[..., 0].sum(), leaf)
    torch.testing.assert_close(found["attr", "observation"], right)
