"""The same attribution as each contender does it: by hand, with tdhook_rl, captum and tdhook 0.3.0.

Each function gives a run without arguments that returns what the contender computed. A peer that is not installed
is left out (:func:`installed`).
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.nets import CLASS, Problem
from tdhook_rl import Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.attribution.integrated_gradients import quadrature

__all__ = ["STEPS", "Run", "by_hand", "captum", "installed", "ours", "tdhook", "zennit_composite"]

Run = Callable[[], Tensor]
STEPS = 50


def installed(peer: str) -> bool:
    return find_spec(peer) is not None


# ------------------------------------------------------------------ by hand: the floor


def by_hand(method: str, problem: Problem, chunk: int | None = None, steps: int = STEPS) -> Run:
    """What a user would write without a library, at its fastest."""
    if method == "Saliency":
        return partial(_gradient_by_hand, problem.net, problem.x)
    points, weights = (torch.tensor(values) for values in quadrature("gausslegendre", steps))
    at_once = steps if chunk is None else max(1, chunk // len(problem.x))
    return partial(_integrate_by_hand, problem, points.split(at_once), weights.split(at_once))


def _gradient_by_hand(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(net(x)[:, CLASS].sum(), x)[0]


def _integrate_by_hand(problem: Problem, points: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
    x, baseline = problem.x, problem.baseline
    total = torch.zeros_like(x)
    for alphas, shares in zip(points, weights, strict=True):
        path = torch.lerp(baseline, x, alphas.reshape(-1, *(1,) * x.ndim)).flatten(0, 1).requires_grad_()
        outer = shares.repeat_interleave(len(x))
        gradient = torch.autograd.grad(problem.net(path)[:, CLASS], path, outer)[0]
        total += gradient.reshape(len(alphas), *x.shape).sum(0)
    return total * (x - baseline)


# ------------------------------------------------------------------ tdhook_rl


def ours(method: str, problem: Problem, stack: ExitStack, steps: int = STEPS) -> tuple[Run, Run]:
    """The hooked policy called, and ``annotate``, with the defaults."""
    explains: dict[str, Any] = {"target": targets.logit(CLASS, key="output")}
    if method.endswith("init_attr_targets"):
        explains = {"init_attr_targets": one_output}
    made = Saliency(**explains) if method == "Saliency" else IntegratedGradients(**explains, n_steps=steps)
    hooked = stack.enter_context(made.prepare(problem.net))
    data, batch = _data(method, problem), _data(method, problem)
    return (
        lambda: hooked(data)["attr", "input"],
        lambda: hooked.annotate(batch)["attr", "input"],
    )


def one_output(outputs: TensorDict, _: TensorDict) -> TensorDict:
    """What is explained, as tdhook is told it."""
    return TensorDict(out=outputs["output"][..., CLASS], batch_size=outputs.batch_size)


def _data(method: str, problem: Problem) -> TensorDict:
    baseline = {} if method == "Saliency" else {("baseline", "input"): problem.baseline}
    return TensorDict({"input": problem.x, **baseline}, batch_size=len(problem.x))


# ------------------------------------------------------------------ peers


def captum(method: str, problem: Problem, chunk: int | None = None, steps: int = STEPS) -> Run:
    from captum import attr

    if method == "Saliency":
        # A leaf that requires a gradient already spares captum a warning at every call.
        x = problem.x.clone().requires_grad_()
        return partial(attr.Saliency(problem.net).attribute, x, target=CLASS, abs=False)
    return partial(
        attr.IntegratedGradients(problem.net).attribute,
        problem.x,
        baselines=problem.baseline,
        target=CLASS,
        n_steps=steps,
        method="gausslegendre",
        internal_batch_size=chunk,
    )


def tdhook(method: str, problem: Problem, stack: ExitStack, steps: int = STEPS) -> Run:
    from tdhook import attribution

    if method == "Saliency":
        made = attribution.Saliency(init_attr_targets=one_output)
    else:
        made = attribution.IntegratedGradients(init_attr_targets=one_output, multiply_by_inputs=True, n_steps=steps)
    # It places hooks on the module and switches requires_grad on in the tensors that it is given.
    hooked = stack.enter_context(made.prepare(copy.deepcopy(problem.net)))
    data = _data(method, problem).clone()
    return lambda: hooked(data)["attr", "input"]


def zennit_composite(epsilon: float) -> Any:
    """Epsilon at every linear layer and convolution.

    zennit imports torchvision for two classes that its canonizers of residual networks look for, and for nothing
    else; beside a CPU build of torch the index has none that loads, so that stand-ins take its place meanwhile.
    """
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    absent = "zennit" not in sys.modules and not installed("torchvision")
    if absent:
        sys.modules.update({name: types.ModuleType(name) for name in names})
        classes = {name: type(name, (nn.Module,), {}) for name in ("Bottleneck", "BasicBlock")}
        vars(sys.modules[names[-1]]).update(classes)
    try:
        from zennit.composites import LayerMapComposite
        from zennit.rules import Epsilon
        from zennit.types import Convolution, Linear
    finally:
        for name in names if absent else ():
            del sys.modules[name]
    return LayerMapComposite([((Convolution, Linear), Epsilon(epsilon=epsilon))])
