"""Noise: every pass over a step sees the noise of the step, every pass over a batch one and the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator

from tdhook_rl import Compose, IntegratedGradients, Saliency, Scheduled, targets
from tdhook_rl.attribution import Occlusion

ROWS = 6


class OwnNoise(nn.Module):
    """Noise that no layer of torch draws."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def critic(layer: nn.Module) -> ValueOperator:
    return ValueOperator(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), layer, nn.Linear(16, 1)), in_keys=["observation"])


def categorical() -> ProbabilisticActor:
    head = TensorDictModule(
        nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)), ["observation"], ["logits"]
    )
    return ProbabilisticActor(head, in_keys=["logits"], distribution_class=Categorical)


def tanh_normal() -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
    head = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(head, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)


def greedy() -> TensorDictSequential:
    values = QValueActor(nn.Linear(4, 3), in_keys=["observation"], spec=CategoricalSpec(3))
    return TensorDictSequential(values, EGreedyModule(CategoricalSpec(3), eps_init=0.5, eps_end=0.5))


def twice() -> TensorDictSequential:
    """Two draws, and noise after each."""
    again = TensorDictModule(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), ["observation"], ["more"])
    second = ProbabilisticActor(again, in_keys={"logits": "more"}, out_keys=["other"], distribution_class=Categorical)
    return TensorDictSequential(categorical(), second)


ACTORS = {"categorical": categorical, "tanh_normal": tanh_normal, "greedy": greedy, "twice": twice}
LAYERS = {"dropout": lambda: nn.Dropout(0.5), "own": OwnNoise}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("actor", ACTORS)
def test_what_is_behind_a_draw_is_explained_by_its_own_noise(actor: str, layer: str, inference: bool) -> None:
    torch.manual_seed(0)
    policy = TensorDictSequential(ACTORS[actor](), critic(LAYERS[layer]()))
    x = torch.randn(ROWS, 4)
    leaf = x.clone().requires_grad_()
    value = targets.state_value()
    method = Compose(
        Saliency(target={"one": value, "two": value}, when="step"),
        Saliency(target=value, when="step", attribution_key="second"),
        IntegratedGradients(target=value, baseline=0.0, n_steps=60, when="step", attribution_key="path"),
        Occlusion(target=value, when="step", attribution_key="occluded"),
        Scheduled(Saliency(target=value, when="step", attribution_key="some"), fraction=0.5),
    )
    with set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(3)
        plain = policy(TensorDict({"observation": leaf}, [ROWS]))
        after = torch.rand(())
        (right,) = torch.autograd.grad(plain["state_value"].sum(), leaf)
        with method.prepare(policy) as hooked, torch.inference_mode(inference):
            torch.manual_seed(3)
            found = hooked(TensorDict({"observation": x.clone()}, [ROWS]))
            assert torch.equal(torch.rand(()), after)
    assert torch.equal(found["state_value"], plain["state_value"])
    for key in (("attr", "one"), ("attr", "two"), "second"):
        torch.testing.assert_close(found[key]["observation"], right)
    rows = found["computed", "some"]
    torch.testing.assert_close(found["some", "observation"][rows], right[rows])
    # Along the path and with a feature taken away the masks are the same: what is left at zero is the bias's part.
    torch.manual_seed(3)
    with set_exploration_type(ExplorationType.RANDOM):
        zero = policy(TensorDict({"observation": torch.zeros(ROWS, 4)}, [ROWS]))
    if actor != "greedy":  # which draws by the values that it sees
        change = (plain["state_value"] - zero["state_value"]).squeeze(-1).detach()
        torch.testing.assert_close(found["path", "observation"].sum(-1), change, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_feature_without_weights_is_given_nothing(layer: str, when: str) -> None:
    net = nn.Sequential(nn.Linear(4, 32), LAYERS[layer](), nn.Linear(32, 1))
    with torch.no_grad():
        net[0].weight[:, 3] = 0
    method = Compose(
        Occlusion(target=targets.logit(0), when=when),
        IntegratedGradients(target=targets.logit(0), baseline=0.0, when=when, attribution_key="path"),
    )
    data = TensorDict({"observation": torch.randn(2, 3, 4)}, [2, 3])
    with method.prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        found = hooked(data) if when == "step" else hooked.annotate(data)
    assert found["attr", "observation"][..., 3].abs().max() == 0
    assert found["attr", "observation"][..., 0].abs().max() > 0
    torch.testing.assert_close(found["path", "observation"], found["attr", "observation"], atol=1e-4, rtol=1e-3)


NOISY: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.3),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 4, 8, batch_first=True, dropout=0.5, norm_first=True),
        2,
        enable_nested_tensor=False,
    ),
    "dropout": lambda: nn.Dropout(0.5),
    "feature dropout": lambda: nn.Dropout1d(0.5),
    "RReLU": nn.RReLU,
    "own": OwnNoise,
}


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["saliency", "path"])
@pytest.mark.parametrize("layer", NOISY)
@pytest.mark.parametrize("made_inside", [False, True])
def test_layers_are_explained_by_the_noise_of_the_step_in_every_mode(
    layer: str, method: str, guard: Callable[[], Any], made_inside: bool
) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(made_inside and guard is torch.inference_mode and layer != "encoder"):
        net = nn.Sequential(
            nn.Unflatten(-1, (2, 2)), nn.Linear(2, 8), NOISY[layer](), nn.Flatten(-2), nn.Linear(16, 3)
        ).double()
    if net[1].weight.is_inference() and layer == "encoder layer":
        pytest.skip("autograd cannot, and functorch draws otherwise")
    target = targets.logit(1)
    explains: Any = Saliency(target=target, when="step")
    if method == "path":
        explains = IntegratedGradients(target=target, baseline=0.0, when="step", n_steps=6)
    with guard(), explains.prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for step in range(2):
            with torch.inference_mode(False):
                x = torch.randn(5, 4, dtype=torch.float64)
            torch.manual_seed(step)
            found = hooked(TensorDict({"observation": x}, [5]))
            points = [(1.0, 1.0)] if method == "saliency" else gauss_points(6)
            expected = sum(weight * slope(net, x * point, step) for point, weight in points)
            expected = expected if method == "saliency" else expected * x
            torch.testing.assert_close(found["attr", "observation"], expected)


def gauss_points(count: int) -> list[tuple[float, float]]:
    return [
        ((point + 1) / 2, weight / 2) for point, weight in zip(*np.polynomial.legendre.leggauss(count), strict=True)
    ]


def slope(net: nn.Module, x: Tensor, seed: int) -> Tensor:
    """By autograd, of a copy whose tensors it can take."""
    with torch.inference_mode(False), torch.enable_grad():
        plain = copy.deepcopy(net).requires_grad_(False)
        for child in plain.modules():
            for name, tensor in list(child._parameters.items()):
                if tensor is not None:
                    child._parameters[name] = nn.Parameter(tensor.clone())
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        return torch.autograd.grad(plain(leaf)[:, 1].sum(), leaf)[0]


#: What a target of the user's may draw from, by what the next number there is.
STREAMS = {
    "torch": (lambda: torch.rand(()), lambda: float(torch.rand(()))),
    "numpy": (np.random.rand, np.random.rand),
    "python": (random.random, random.random),
}
TRUNKS = {
    "a chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "no chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.Softsign(), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("stream", STREAMS)
def test_targets_that_draw_leave_the_streams_as_they_were(
    stream: str, trunk: str, acts: bool, when: str, mode: Any
) -> None:
    draw, following = STREAMS[stream]
    policy: Any = TensorDictModule(TRUNKS[trunk](), ["observation"], ["logits"])
    if acts:
        policy = ProbabilisticActor(policy, ["logits"], distribution_class=Categorical)
    data = TensorDict({"observation": torch.randn(ROWS, 4)}, [ROWS])

    def after(run: Callable[[TensorDict], Any]) -> float:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        with mode(), set_exploration_type(ExplorationType.RANDOM):
            run(data.copy())
        return following()

    method = Saliency(target=lambda run: run.outputs["logits"][..., 1] * draw(), when=when)
    with method.prepare(policy) as hooked:
        for _ in range(2):
            assert after(hooked) == after(policy)
        if when == "batch":
            with torch.no_grad():
                batch = policy(data.copy())
            assert after(lambda _: hooked.annotate(batch, on_mismatch="ignore")) == after(lambda _: None)
