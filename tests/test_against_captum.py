"""Captum as one more oracle, in float64, where it is right; and where it is not, what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from captum import attr
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from captum.metrics import infidelity, sensitivity_max
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import targets
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.attribution import LRP, GuidedBackpropagation, IntegratedGradients, Occlusion, Saliency
from tdhook_rl.attribution.base import GradientAttribution
from tdhook_rl.attribution.grad_cam import DimsConfig, GradCAM
from tdhook_rl.attribution.lrp_rules import Gamma, Uniform, ZPlus
from tdhook_rl.metrics import InfidelityMetric, SensitivityMetric
from tdhook_rl.metrics.row_draws import BLOCK
from tests.policies import CASES, FEATURES, mlp, pixels

F64 = torch.float64
BATCHES = [(), (5,), (2, 3)]
RULES = ["gausslegendre", "riemann_middle", "riemann_left", "riemann_right"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum.*")


@dataclass(frozen=True)
class Net:
    """A policy (or plain net), the net inside it that captum is given, and one inner module of both."""

    build: Callable[[], nn.Module]
    inside: Callable[[nn.Module], nn.Module]
    site: str
    inner: Callable[[nn.Module], nn.Module]
    key: str = "input"
    shape: tuple[int, ...] = (FEATURES,)


class Conv(nn.Module):
    """Flattened by a function: captum's LRP has no rule for ``nn.Flatten``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU())
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(-3))


NETS = {
    "tanh": Net(mlp, lambda net: net, "1", lambda net: net[1]),
    "relu": Net(partial(mlp, activation=nn.ReLU), lambda net: net, "3", lambda net: net[3]),
    "conv": Net(Conv, lambda net: net, "body.4", lambda net: net.body[4], shape=(3, 8, 8)),
    "policy": Net(
        CASES["categorical"].build,
        lambda actor: actor.module[0].module,
        "module.0.module.1",
        lambda actor: actor.module[0].module[1],
        "observation",
    ),
    "pixels": Net(
        pixels,
        lambda actor: actor.module[0].module,
        "module.0.module.0.1",
        lambda actor: actor.module[0].module[0][1],
        "pixels",
        (3, 8, 8),
    ),
}
over = partial(pytest.mark.parametrize, "name")
batches = pytest.mark.parametrize("batch", BATCHES)


class Both:
    """One policy and one batch: what the library computes of the chosen action's logit, and what captum is given."""

    def __init__(self, name: str, batch: tuple[int, ...]) -> None:
        self.case = NETS[name]
        self.batch = batch
        self.policy = self.case.build().double()
        self.net = self.case.inside(self.policy)
        self.layer = self.case.inner(self.policy)
        self.x = torch.randn(*batch, *self.case.shape, dtype=F64)
        self.low = torch.randn(*batch, *self.case.shape, dtype=F64)
        self.action = torch.randint(0, 4, batch)
        self.flat, self.flat_low = self.flatten(self.x).requires_grad_(), self.flatten(self.low)
        self.index = self.action.reshape(-1) if batch else self.action.reshape(1)

    def flatten(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *value.shape[len(self.batch) :])

    @property
    def data(self) -> TensorDict:
        key = self.case.key
        entries = {key: self.x.clone(), ("baseline", key): self.low, "action": self.action}
        return TensorDict(entries, batch_size=self.batch)

    def compute(self, method: GradientAttribution, key: str | None = None) -> Tensor:
        """The attribution by the library, with the rows of captum's."""
        with method.prepare(self.policy) as hooked:
            found = hooked.annotate(self.data)["attr", key or self.case.key]
        return self.flatten(found)


def logit() -> targets.Target:
    """The logit (or output) of the stored action."""

    def chosen(run) -> Tensor:
        return targets.chosen_logit("logits" if "logits" in run.outputs.keys() else "output").function(run)

    return targets.Target("logit", chosen)


def equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=tolerance * scale)


@over(NETS)
@batches
def test_saliency_and_input_times_gradient(name: str, batch: tuple[int, ...]) -> None:
    both = Both(name, batch)
    expected = attr.Saliency(both.net).attribute(both.flat, target=both.index, abs=False)
    equal(both.compute(Saliency(target=logit())), expected)
    equal(both.compute(Saliency(target=logit(), absolute=True)), expected.abs())
    expected = attr.InputXGradient(both.net).attribute(both.flat, target=both.index)
    equal(both.compute(Saliency(target=logit(), multiply_by_inputs=True)), expected)


# Captum keeps the weights of a quadrature in float32.
@over(NETS)
@batches
@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients(name: str, batch: tuple[int, ...], rule: str) -> None:
    both = Both(name, batch)
    for multiply in (True, False):
        expected = attr.IntegratedGradients(both.net, multiply_by_inputs=multiply).attribute(
            both.flat, both.flat_low, both.index, n_steps=7, method=rule
        )
        method = IntegratedGradients(target=logit(), n_steps=7, method=rule, multiply_by_inputs=multiply)
        equal(both.compute(method), expected, 1e-6)


def test_the_convergence_delta() -> None:
    both = Both("policy", (5,))
    _, expected = attr.IntegratedGradients(both.net).attribute(
        both.flat, both.flat_low, both.index, n_steps=4, return_convergence_delta=True
    )
    method = IntegratedGradients(target=logit(), n_steps=4, compute_convergence_delta=True)
    with method.prepare(both.policy) as hooked:
        equal(hooked.annotate(both.data)["convergence_delta"], expected, 1e-5)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_captums_trapezoid_is_biased_and_ours_is_not(steps: int) -> None:
    """The weights of captum's rule add up to 1 - 1/n, so that it misses 1/n of the change of a linear net."""
    net, x = nn.Linear(FEATURES, 1).double(), torch.randn(4, FEATURES, dtype=F64, requires_grad=True)
    change = net(x) - net(torch.zeros_like(x))
    theirs = attr.IntegratedGradients(net).attribute(x, n_steps=steps, method="riemann_trapezoid")
    equal(theirs.sum(-1, keepdim=True), change * (1 - 1 / steps), 1e-6)
    with IntegratedGradients(baseline=0.0, n_steps=steps, method="riemann_trapezoid").prepare(net) as hooked:
        ours = hooked(TensorDict({"input": x.detach()}, batch_size=4))["attr", "input"]
    equal(ours.sum(-1, keepdim=True), change)


@pytest.mark.parametrize(("name", "batch"), [("conv", ()), ("conv", (5,)), ("pixels", (5,)), ("pixels", (2, 3))])
@pytest.mark.parametrize("relu", [False, True])
def test_grad_cam(name: str, batch: tuple[int, ...], relu: bool) -> None:
    both = Both(name, batch)
    site = both.case.site
    method = GradCAM(modules_to_attribute={site: DimsConfig()}, target=logit(), relu=relu)
    expected = attr.LayerGradCam(both.net, both.layer).attribute(both.flat, both.index, relu_attributions=relu)
    equal(both.compute(method, site), expected[:, 0])


@over(["relu", "conv"])
@batches
def test_guided_backpropagation(name: str, batch: tuple[int, ...]) -> None:
    both = Both(name, batch)
    expected = attr.GuidedBackprop(both.net).attribute(both.flat, target=both.index)
    equal(both.compute(GuidedBackpropagation(target=logit())), expected)


@over(["tanh", "relu", "conv", "policy"])
@batches
def test_lrp_epsilon(name: str, batch: tuple[int, ...]) -> None:
    both = Both(name, batch)
    found = both.compute(LRP(target=logit(), rule_mapper=Uniform()))
    for module in both.net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.rule = EpsilonRule(epsilon=1e-6)
        if isinstance(module, nn.MaxPool2d):  # an epsilon there as well, where a maximum has nothing to share
            module.rule = EpsilonRule(epsilon=1e-15)
    equal(found, attr.LRP(both.net).attribute(both.flat, target=both.index), 1e-9)


@pytest.mark.parametrize(
    ("rule", "theirs"), [(Gamma(0.25, epsilon=1e-9), GammaRule), (ZPlus(epsilon=1e-9), Alpha1_Beta0_Rule)]
)
def test_lrp_of_signed_parts_where_inputs_are_positive(rule, theirs) -> None:
    """Captum clamps weights alone, not contributions: the same where no input is negative and there is no bias."""
    layers = [nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(16, 3, bias=False)).double()
    x = torch.rand(5, FEATURES, dtype=F64)
    found = {}
    for sign in (1, -1):
        ours = LRP(target=targets.Target("first", lambda run: run.outputs["output"][:, 0]), rule_mapper=Uniform(rule))
        with ours.prepare(net) as hooked:
            found[sign] = hooked(TensorDict({"input": sign * x}, batch_size=5))["attr", "input"]
    expected = {}
    for sign in (1, -1):
        for module in net:
            if isinstance(module, nn.Linear):
                module.rule = theirs()  # taken away by each call
        expected[sign] = attr.LRP(net).attribute((sign * x).requires_grad_(), target=0)
    equal(found[1], expected[1], 1e-5)
    assert not torch.allclose(found[-1], expected[-1].detach(), rtol=1e-2)


@over(["tanh", "relu", "policy"])
@batches
def test_occlusion_of_groups_is_feature_ablation(name: str, batch: tuple[int, ...]) -> None:
    both = Both(name, batch)
    groups = [[0, 3], [1], [2, 4, 5]]
    mask = torch.tensor([0, 1, 2, 0, 2, 2])
    found = both.compute(Occlusion(target=logit(), groups=groups, baseline=None))
    equal(found, attr.FeatureAblation(both.net).attribute(both.flat, both.flat_low, both.index, feature_mask=mask))
    expected = attr.FeatureAblation(both.net).attribute(both.flat, 0.5, both.index)
    equal(both.compute(Occlusion(target=logit(), baseline=0.5)), expected)


@over(["tanh", "policy", "conv", "pixels"])
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_inner_activations(name: str, batch: tuple[int, ...]) -> None:
    both = Both(name, batch)
    site = both.case.site
    expected = attr.LayerIntegratedGradients(both.net, both.layer).attribute(
        both.flat, both.flat_low, both.index, n_steps=6
    )
    equal(both.compute(IntegratedGradients(target=logit(), input_modules=[site], n_steps=6), site), expected, 1e-6)
    expected = attr.LayerGradientXActivation(both.net, both.layer).attribute(both.flat, both.index)
    method = Saliency(target=logit(), input_modules=[site], multiply_by_inputs=True)
    equal(both.compute(method, site), expected)


def test_an_inner_activation_that_the_input_goes_past() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x).tanh() * x).sum(-1)

    net = Gate().double()
    x, low = torch.randn(2, 5, FEATURES, dtype=F64)
    expected = attr.LayerIntegratedGradients(net, net.inner).attribute(x, low, n_steps=6)
    with IntegratedGradients(input_modules=["inner"], n_steps=6).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x, ("baseline", "input"): low}, batch_size=5))["attr", "inner"]
    equal(found, expected, 1e-6)


def draws(draw: Callable[[torch.Generator], Tensor], samples: int) -> Tensor:
    """What a metric draws from the generator of its first rows, a sample after the other, in captum's order of rows."""
    generator = torch.Generator().manual_seed(stream_of(0, "perturbations", 0))
    return torch.stack([draw(generator)[:5] for _ in range(samples)], 1).flatten(0, 1)


@over(["tanh", "policy"])
def test_infidelity_and_sensitivity_of_the_same_perturbations(name: str) -> None:
    both = Both(name, (5,))
    noise = draws(lambda g: 0.01 * torch.randn(BLOCK, FEATURES, generator=g, dtype=F64), 10)
    moves = draws(lambda g: (2 * torch.rand(BLOCK, FEATURES, generator=g, dtype=F64) - 1) * 0.02, 10)
    with Saliency(target=logit()).prepare(both.policy) as hooked:
        data = hooked.annotate(both.data)
        found = InfidelityMetric()(hooked, data), SensitivityMetric()(hooked, data)
    slopes = data["attr", both.case.key]
    expected = infidelity(
        both.net, lambda x, *_: (noise, x - noise), both.flat.detach(), slopes, target=both.index, n_perturb_samples=10
    )
    equal(found[0], expected, 1e-6)

    def explain(x: tuple[Tensor], target: Tensor) -> tuple[Tensor]:
        (x,) = x
        return (attr.Saliency(both.net).attribute(x.detach().requires_grad_(), target=target, abs=False),)

    def move(x: Tensor | tuple[Tensor], *_) -> tuple[Tensor]:
        return (x + moves,) if isinstance(x, Tensor) else (x[0] + moves,)

    expected = sensitivity_max(explain, both.flat.detach(), move, target=both.index, n_perturb_samples=10)
    equal(found[1], expected, 1e-9)
