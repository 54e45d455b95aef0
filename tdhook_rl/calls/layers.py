"""The layers whose derivative is known, as a table by class: what they compute, and how they hand a gradient on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_aten = torch.ops.aten


class Layer(NamedTuple):
    """What a layer computes, and how it hands a gradient on.

    Attributes:
        forward: ``(module, x) -> y``.
        backward: ``(module, gradient, kept) -> gradient``, with autograd's own operations.
        keeps: what ``backward`` is given: the layer's ``"input"``, ``"output"``, ``"weight"``, or ``"both"``, input and
            weight.
        stacks: ``backward`` takes several gradients in dimensions before those of the output.
        fits: of one that does not stack, whether it is known of a module as this is set up.
    """

    forward: Callable[[Any, Tensor], Tensor]
    backward: Callable[[Any, Tensor, Tensor], Tensor]
    keeps: str
    stacks: bool = True
    fits: Callable[[Any], bool] | None = None


def _convolve(module: nn.Conv2d, x: Tensor) -> Tensor:
    own = module._parameters
    weight: Any = own["weight"]
    return F.conv2d(x, weight, own["bias"], module.stride, module.padding, module.dilation, module.groups)


def _convolve_back(module: nn.Conv2d, gradient: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    x, weight = kept
    one = x.ndim == 3  # without a batch
    found = _aten.convolution_backward.default(
        gradient.unsqueeze(0) if one else gradient, x.unsqueeze(0) if one else x, weight, None,
        module.stride, module.padding, module.dilation, False, [0, 0], module.groups, [True, False, False],
    )[0]  # fmt: skip
    return found.squeeze(0) if one else found


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    own = module._parameters  # a look at the dictionary is cheaper than module.weight
    return F.linear(x, own["weight"], own["bias"])


#: The layers by their exact class: a subclass may compute something else.
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(_linear, lambda m, g, w: g.matmul(w), "weight"),
    nn.ReLU: Layer(lambda m, x: torch.relu(x), lambda m, g, y: _aten.threshold_backward.default(g, y, 0), "output"),
    nn.Tanh: Layer(lambda m, x: torch.tanh(x), lambda m, g, y: _aten.tanh_backward.default(g, y), "output"),
    nn.Identity: Layer(lambda m, x: x, lambda m, g, y: g, "output"),
    nn.Sigmoid: Layer(lambda m, x: torch.sigmoid(x), lambda m, g, y: _aten.sigmoid_backward.default(g, y), "output"),
    nn.ELU: Layer(
        lambda m, x: F.elu(x, m.alpha), lambda m, g, x: _aten.elu_backward.default(g, m.alpha, 1, 1, False, x), "input"
    ),
    nn.LeakyReLU: Layer(
        lambda m, x: F.leaky_relu(x, m.negative_slope),
        lambda m, g, x: _aten.leaky_relu_backward.default(g, x, m.negative_slope, False),
        "input",
    ),
    nn.SiLU: Layer(lambda m, x: F.silu(x), lambda m, g, x: _aten.silu_backward.default(g, x), "input"),
    nn.GELU: Layer(
        lambda m, x: F.gelu(x, approximate=m.approximate),
        lambda m, g, x: _aten.gelu_backward.default(g, x, approximate=m.approximate),
        "input",
    ),
    nn.Conv2d: Layer(
        _convolve,
        _convolve_back,
        "both",
        stacks=False,
        fits=lambda m: m.padding_mode == "zeros" and not isinstance(m.padding, str),
    ),
    nn.Flatten: Layer(
        lambda m, x: x.flatten(m.start_dim, m.end_dim), lambda m, g, x: g.reshape(x.shape), "input", stacks=False
    ),
    nn.Unflatten: Layer(
        lambda m, x: x.unflatten(m.dim, m.unflattened_size),
        lambda m, g, x: g.reshape(x.shape),
        "input",
        stacks=False,
        fits=lambda m: all(isinstance(one, int) for one in (m.dim, *m.unflattened_size)),
    ),
}
