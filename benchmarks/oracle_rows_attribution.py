"""Rows of the oracle table: attributions of gradients and perturbations, and metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad_vec
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.comparison import Case, row
from tdhook_rl import targets
from tdhook_rl.attribution import (
    SARFA,
    ActivationMaximisation,
    DimsConfig,
    GradCAM,
    GuidedBackpropagation,
    IntegratedGradients,
    Occlusion,
    PerturbationSaliency,
    Saliency,
)
from tdhook_rl.metrics import InfidelityMetric, SensitivityMetric, completeness_gap
from tests.oracles import row_gradients
from tests.policies import FEATURES, bytes_actor, categorical, mlp
from tests.test_cam_and_guided import cam_net, guided_by_hand, relu_net
from tests.test_perturbation import slow_saliency, slow_sarfa

ROWS, INDEX, STEPS = 5, 1, 50


def target() -> targets.Target:
    return targets.Target("output", lambda run: run.outputs["output"][..., INDEX])


def chosen(outputs: Any, _: Any) -> TensorDict:
    """The same as a callback, which is the form that tdhook has."""
    return TensorDict(out=outputs["output"][..., INDEX], batch_size=outputs.batch_size)


def inputs(*batch: int) -> Tensor:
    return torch.randn(*(batch or (ROWS,)), FEATURES, dtype=torch.float64)


def result(method: Any, net: nn.Module, x: Tensor, key: Any = ("attr", "input"), **entries: Tensor) -> Tensor:
    """What a method of this library or of tdhook writes; entries are roots of second inputs."""
    batch = x.shape[: 1 if x.ndim < 3 or x.ndim == 4 else 2]
    data = TensorDict({"input": x.clone()}, batch_size=batch)
    for root, value in entries.items():
        data[root, "input"] = value
    with method.prepare(copy.deepcopy(net)) as hooked:
        return hooked(data)[key]


def captum(name: str, net: nn.Module, x: Tensor, *args: Any, layer: str | None = None, **options: Any) -> Tensor:
    """What captum gives for one output."""
    from captum import attr

    net = copy.deepcopy(net)
    places = [] if layer is None else [net.get_submodule(layer)]
    return getattr(attr, name)(net, *places).attribute(x.clone().requires_grad_(), *args, target=INDEX, **options)


def tdhook(name: str, **options: Any) -> Any:
    import tdhook.attribution

    return getattr(tdhook.attribution, name)(init_attr_targets=chosen, **options)


@row("Saliency", "forward-mode Jacobians")
def saliency() -> Case:
    net, x = mlp().double(), inputs()
    return Case(
        row_gradients(lambda v: net(v)[INDEX], x),
        lambda: result(Saliency(target=target()), net, x),
        lambda: captum("Saliency", net, x, abs=False),
        lambda: result(tdhook("Saliency"), net, x),
    )


@row("Saliency of the stored action's log-probability", "forward-mode Jacobians")
def taken_action() -> Case:
    actor = categorical().double()
    net = actor.module[0].module
    data = actor(TensorDict({"observation": inputs()}, batch_size=ROWS)).detach()
    x, action = data["observation"], data["action"]

    def ours() -> Tensor:
        with Saliency(target=targets.taken_action_log_prob()).prepare(actor) as hooked:
            return hooked.annotate(data)["attr", "observation"]

    def theirs() -> Tensor:
        from captum.attr import Saliency as Captum

        explained = Captum(lambda v: net(v).log_softmax(-1))
        return explained.attribute(x.clone().requires_grad_(), target=action, abs=False)

    def tdhooks() -> Tensor:
        from tdhook.attribution import Saliency as Tdhook

        def log_prob(outputs: Any, additional: Any) -> TensorDict:
            picked = outputs["logits"].log_softmax(-1).gather(-1, additional["action"][:, None])
            return TensorDict(out=picked, batch_size=outputs.batch_size)

        method = Tdhook(init_attr_targets=log_prob, additional_init_keys=["action"])
        with method.prepare(copy.deepcopy(actor)) as hooked:
            return hooked(data.clone())["attr", "observation"]

    expected = [
        row_gradients(lambda v, a=a: net(v).log_softmax(-1)[a], one[None])[0] for one, a in zip(x, action, strict=True)
    ]
    return Case(torch.stack(expected), ours, theirs, tdhooks)


@row("Saliency of bytes (uint8 pixels)", "forward-mode Jacobians, in float32")
def of_bytes() -> Case:
    actor = bytes_actor()
    net = actor.module[0].module
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    data = TensorDict({"pixels": pixels, "action": torch.full((2,), INDEX)}, batch_size=2)

    def ours() -> Tensor:
        with Saliency(target=targets.chosen_logit()).prepare(actor) as hooked:
            return hooked.annotate(data)["attr", "pixels"]

    def theirs() -> Tensor:
        from captum.attr import Saliency as Captum

        return Captum(net).attribute(pixels, target=INDEX, abs=False)

    def tdhooks() -> Tensor:
        from tdhook.attribution import Saliency as Tdhook

        def logit(outputs: Any, _: Any) -> TensorDict:
            return TensorDict(out=outputs["logits"][..., INDEX], batch_size=outputs.batch_size)

        with Tdhook(init_attr_targets=logit).prepare(copy.deepcopy(actor)) as hooked:
            return hooked(data.select("pixels"))["attr", "pixels"]

    return Case(row_gradients(lambda v: net(v[None])[0, INDEX], pixels.float()), ours, theirs, tdhooks)


def integral(net: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Integrated gradients by adaptive quadrature of Jacobians."""

    def slopes(alpha: float) -> np.ndarray:
        return row_gradients(lambda v: net(v)[INDEX], low + alpha * (high - low)).detach().numpy()

    return (high - low) * torch.from_numpy(quad_vec(slopes, 0, 1, epsabs=1e-13, epsrel=1e-13)[0])


@row("IntegratedGradients, as it is by default", "adaptive quadrature of Jacobians")
def integrated_gradients() -> Case:
    net, x, low = mlp().double(), inputs(), inputs()
    return Case(
        integral(net, low, x),
        lambda: result(IntegratedGradients(target=target()), net, x, baseline=low),
        lambda: captum("IntegratedGradients", net, x, low),
        lambda: result(tdhook("IntegratedGradients"), net, x, baseline=low),
    )


@row("IntegratedGradients, trapezoid with 10 points", "W (x - b) of a linear net")
def trapezoid() -> Case:
    net, x, low = nn.Linear(FEATURES, 3).double(), inputs(), inputs()
    options = {"n_steps": 10, "method": "riemann_trapezoid"}
    return Case(
        net.weight[INDEX] * (x - low),
        lambda: result(IntegratedGradients(target=target(), **options), net, x, baseline=low),
        lambda: captum("IntegratedGradients", net, x, low, **options),
        lambda: result(tdhook("IntegratedGradients", multiply_by_inputs=True, **options), net, x, baseline=low),
    )


@row("IntegratedGradients of an activation", "adaptive quadrature of Jacobians")
def inner_activation() -> Case:
    net, x, low = mlp().double(), inputs(), inputs()
    key = ("attr", "1")
    options = {"multiply_by_inputs": True, "input_modules": ["1"]}
    return Case(
        integral(net[2:], net[:2](low).detach(), net[:2](x).detach()),
        lambda: result(IntegratedGradients(target=target(), input_modules=["1"]), net, x, key, baseline=low),
        lambda: captum("LayerIntegratedGradients", net, x, low, layer="1"),
        lambda: result(tdhook("IntegratedGradients", **options), net, x, key, baseline=low),
    )


@row("GradCAM", "class activation map by hand")
def grad_cam() -> Case:
    net, x = cam_net(), torch.randn(ROWS, 3, 8, 8, dtype=torch.float64)
    key, options = ("attr", "1"), {"modules_to_attribute": {"1": DimsConfig((-2, -1), (-3,))}}

    def tdhooks() -> Tensor:
        from tdhook.attribution.grad_cam import DimsConfig as Dims

        return result(tdhook("GradCAM", modules_to_attribute={"1": Dims((-2, -1), (-3,))}), net, x, key)

    return Case(
        torch.einsum("c,bchw->bhw", net[4].weight[INDEX], net[:2](x)) / 36,
        lambda: result(GradCAM(target=target(), **options), net, x, key),
        lambda: captum("LayerGradCam", net, x, layer="1")[:, 0],
        tdhooks,
    )


@row("GradCAM over time and batch, dimensions from the start", "class activation map by hand")
def grad_cam_over_time() -> Case:
    x, key = inputs(4, ROWS), ("attr", "0")
    net = nn.Sequential(nn.Unflatten(-1, (2, 3)), nn.ReLU(), nn.Flatten(-2), nn.Linear(6, 3)).double()

    def tdhooks() -> Tensor:
        from tdhook.attribution.grad_cam import DimsConfig as Dims

        return result(tdhook("GradCAM", modules_to_attribute={"0": Dims((2,), (1,))}), net, x, key)

    ours = GradCAM(target=target(), modules_to_attribute={"0": DimsConfig((2,), (1,))})
    channels = x.unflatten(-1, (2, 3))
    slopes = (net[3].weight[INDEX] * (x > 0)).unflatten(-1, (2, 3)).mean(-1, keepdim=True)
    return Case((slopes * channels).sum(-2), lambda: result(ours, net, x, key), None, tdhooks)


@row("GuidedBackpropagation", "masks by hand")
def guided() -> Case:
    net, x = relu_net(), inputs()
    return Case(
        guided_by_hand(net, x, INDEX),
        lambda: result(GuidedBackpropagation(target=target()), net, x),
        lambda: captum("GuidedBackprop", net, x),
        lambda: result(tdhook("GuidedBackpropagation"), net, x),
    )


@row("Occlusion of groups", "a loop")
def occlusion() -> Case:
    net, x, groups = mlp().double(), inputs(), [[0, 3], [1], [2, 4, 5]]
    expected = torch.zeros_like(x)
    for group in groups:
        changed = x.clone()
        changed[:, group] = 0.5
        expected[:, group] = (net(x) - net(changed))[:, [INDEX]].detach()
    mask = torch.tensor([0, 1, 2, 0, 2, 2])
    return Case(
        expected,
        lambda: result(Occlusion(target=target(), groups=groups, baseline=0.5), net, x),
        lambda: captum("FeatureAblation", net, x, 0.5, feature_mask=mask),
    )


@row("SARFA", "a loop in numpy")
def sarfa() -> Case:
    net, x = mlp().double(), inputs()
    action = torch.randint(0, 4, (ROWS,))

    def ours() -> Tensor:
        with SARFA().prepare(net, out_keys=["logits"]) as hooked:
            return hooked(TensorDict({"input": x, "action": action}, batch_size=ROWS))["attr", "input"]

    def values(one: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(one)).detach().numpy()

    each = [[index] for index in range(FEATURES)]
    return Case([slow_sarfa(values, one.numpy(), int(a), each) for one, a in zip(x, action, strict=True)], ours)


@row("PerturbationSaliency", "a loop in numpy")
def perturbation_saliency() -> Case:
    net, x = cam_net(), torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def drop(one: Tensor) -> Callable[[np.ndarray], float]:
        return lambda image: float((net(one[None]) - net(torch.from_numpy(image)[None]))[0, INDEX].detach())

    method = PerturbationSaliency(target=target(), stride=1, sigma=1.5, blur_sigma=2.0)
    expected = [slow_saliency(drop(one), one.numpy(), (8, 8), 1.5, 2.0) for one in x]
    return Case(expected, lambda: result(method, net, x))


@row("ActivationMaximisation", "steps along the weights of a linear net")
def activation_maximisation() -> Case:
    net, x = nn.Sequential(nn.Linear(FEATURES, 3)).double(), inputs()

    def tdhooks() -> Tensor:
        from tdhook.attribution import ActivationMaximisation as Tdhook

        return result(Tdhook(["[0]"], alpha=0.3, n_steps=7), net, x)

    method = ActivationMaximisation("0", alpha=0.3, n_steps=7)
    return Case(x + 7 * 0.3 * net[0].weight.sum(0), lambda: result(method, net, x), None, tdhooks)


@row("InfidelityMetric of the exact gradient, defaults", "0 for a linear net")
def infidelity() -> Case:
    net, x = nn.Linear(FEATURES, 3).double(), inputs()
    data = TensorDict({"input": x}, batch_size=ROWS)

    def ours() -> Tensor:
        with Saliency(target=target()).prepare(net) as hooked:
            return InfidelityMetric()(hooked, hooked(data.clone()))

    def theirs() -> Tensor:
        from captum.metrics import infidelity as score

        def perturb(v: Tensor) -> tuple[Tensor, Tensor]:
            noise = 0.01 * torch.randn_like(v)
            return noise, v - noise

        return score(net, perturb, x, net.weight[INDEX].detach().expand(ROWS, -1), target=INDEX)

    def tdhooks() -> Tensor:
        from tdhook.metrics import InfidelityMetric as Tdhook

        with tdhook("Saliency").prepare(copy.deepcopy(net)) as hooked:
            return Tdhook()(hooked, hooked(data.clone()))

    return Case(torch.zeros(ROWS), ours, theirs, tdhooks)


@row("SensitivityMetric, defaults", "0 for a linear net")
def sensitivity() -> Case:
    net, x = nn.Linear(FEATURES, 3).double(), inputs()
    data = TensorDict({"input": x}, batch_size=ROWS)

    def ours() -> Tensor:
        with Saliency(target=target()).prepare(net) as hooked:
            return SensitivityMetric()(hooked, hooked(data.clone()))

    def theirs() -> Tensor:
        from captum.attr import Saliency as Captum
        from captum.metrics import sensitivity_max

        def explain(v: Any) -> Any:
            return Captum(net).attribute(tuple(one.detach().requires_grad_() for one in v), target=INDEX, abs=False)

        return sensitivity_max(explain, x)

    def tdhooks() -> Tensor:
        from tdhook.metrics import SensitivityMetric as Tdhook

        with tdhook("Saliency").prepare(copy.deepcopy(net)) as hooked:
            return Tdhook()(hooked, hooked(data.clone()))

    return Case(torch.zeros(ROWS), ours, theirs, tdhooks)


@row("completeness_gap of gradient times input", "sum minus change, by hand")
def completeness() -> Case:
    net, x = mlp().double(), inputs()
    gap = (row_gradients(lambda v: net(v)[INDEX], x) * x).sum(-1) - (net(x) - net(torch.zeros_like(x)))[:, INDEX]

    def ours() -> Tensor:
        with Saliency(target=target(), multiply_by_inputs=True).prepare(net) as hooked:
            return completeness_gap(hooked, hooked(TensorDict({"input": x}, batch_size=ROWS)))

    return Case(gap, ours)
