"""Rules of layer-wise relevance propagation: how one module hands relevance on to its inputs.

Every rule is a share-out: input ``i`` of output ``j`` contributes ``a_ij = x_i w_ij``, and the relevance of ``j``
goes to its inputs in proportion to some function of the contributions (Bach et al. 2015; Montavon et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules.models.utils import SquashDims, SqueezeLayer

from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import (
    CircularPadNd,
    ConstantPadNd,
    ConvNd,
    DropoutNd,
    ReflectionPadNd,
    ReplicationPadNd,
    convolved,
)


class Sum(nn.Module):
    """A sum as a module, so that it can have a rule of its own; ``x + f(x)`` is shared by the epsilon rule."""

    def forward(self, *terms: Tensor) -> Tensor:
        return torch.stack(terms).sum(0)


class Rule(Protocol):
    """Shares the relevance of a module's output among its inputs."""

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        """The relevance of each input, of its shape."""


@dataclass(frozen=True)
class Pass:
    """Hand relevance on unchanged; for activation functions, whose input and output have one shape."""

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        if inputs[0].shape != relevance.shape:
            raise InputError(
                f"the Pass rule needs inputs and outputs of one shape; {type(module).__name__} maps "
                f"{tuple(inputs[0].shape)} to {tuple(relevance.shape)}"
            )
        return (relevance,)


@dataclass(frozen=True)
class Epsilon:
    """In proportion to ``a_ij``, with ``epsilon`` added to the denominator; with 0 this is LRP-0.

    The bias keeps its share, which is absorbed. Works on every module that is linear in its input, pooling and
    :class:`Sum` included.
    """

    epsilon: float = 1e-6

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        function, weight, bias = affine(module, inputs)
        output, back = torch.func.vjp(lambda *x: function(x, weight, bias), *inputs)
        shares = back(ratio(relevance, output, self.epsilon))
        return tuple(x * share for x, share in zip(inputs, shares, strict=True))


@dataclass(frozen=True)
class Gamma:
    """In proportion to ``a_ij + gamma * max(a_ij, 0)`` (Montavon et al. 2019): positive evidence counts for more."""

    gamma: float = 0.25
    epsilon: float = 1e-6

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        function, weight, bias = affine(module, inputs)
        all_of_it = function((x,), weight, bias)
        positive, back_positive = _signed(function, x, weight, bias, 1)
        weights = ratio(relevance, all_of_it + self.gamma * positive, self.epsilon)
        _, back = torch.func.vjp(lambda x: function((x,), weight, bias), x)
        return (x * back(weights)[0] + self.gamma * back_positive(weights),)


@dataclass(frozen=True)
class AlphaBeta:
    """``alpha`` times the share of positive contributions minus ``beta`` times that of negative ones.

    ``alpha - beta`` is 1, so that relevance is conserved (up to the bias).
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise InputError(f"alpha - beta must be 1 and neither negative, got {self.alpha} and {self.beta}")

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        (x,) = inputs
        function, weight, bias = affine(module, inputs)
        positive, back_positive = _signed(function, x, weight, bias, 1)
        shared = self.alpha * back_positive(ratio(relevance, positive, self.epsilon))
        if self.beta:
            negative, back_negative = _signed(function, x, weight, bias, -1)
            shared = shared - self.beta * back_negative(ratio(relevance, negative, self.epsilon))
        return (shared,)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """Positive contributions only: alpha 1, beta 0 (deep Taylor's z-plus rule)."""

    alpha: float = 1.0
    beta: float = 0.0


@dataclass(frozen=True)
class WSquare:
    """In proportion to ``w_ij ** 2``, whatever the input; for the first layer."""

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        return _by_weight(module, inputs, relevance, torch.square)


@dataclass(frozen=True)
class Flat:
    """In equal parts among the inputs that an output is connected to; for the first layer."""

    def share(self, module: Any, inputs: tuple[Tensor, ...], relevance: Tensor) -> tuple[Tensor, ...]:
        return _by_weight(module, inputs, relevance, torch.ones_like)


Affine = Callable[[tuple[Tensor, ...], Tensor | None, Tensor | None], Tensor]


class AffineMap(NamedTuple):
    """A function of inputs, weight and bias that is linear in the inputs, where no module is at hand that is one."""

    function: Affine
    weight: Tensor | None
    bias: Tensor | None


ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Mish,
    nn.CELU, nn.SELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign,
    nn.LogSigmoid, nn.PReLU, nn.RReLU, nn.Threshold,
)  # fmt: skip
CONVOLUTIONS = (ConvNd,)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AVERAGES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, Sum,
)  # fmt: skip
#: Modules without a rule of their own: they move or choose entries, or what they call has one.
ROUTING = (
    SquashDims, SqueezeLayer,
    nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Embedding, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.Unfold, nn.Fold, nn.Upsample,
    DropoutNd, ConstantPadNd, ReflectionPadNd, ReplicationPadNd, CircularPadNd,
)  # fmt: skip
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: Classes that compute what :func:`affine` says; of a subclass that is not known.
PLAIN = frozenset({
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    *BATCH_NORMS, *AVERAGES,
})  # fmt: skip


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes with its own weights as its class says, and nothing else."""
    if type(module) not in PLAIN or "forward" in vars(module):
        return False
    # Norms of weights and masks of old put a tensor of their own in the place of the parameter.
    return all(name in module._parameters for name in ("weight", "bias") if hasattr(module, name))


def affine(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Affine, Tensor | None, Tensor | None]:
    """A module as a function of inputs, weight and bias, linear in the inputs; and its weight and bias.

    Raises:
        InputError: for a module that is not linear in its input.
    """
    if isinstance(module, AffineMap):
        return module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        return lambda x, w, b: F.linear(x[0], w, b), weight, bias
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        function = getattr(F, f"conv_transpose{len(module.kernel_size)}d")
        options = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
        return lambda x, w, b: function(x[0], w, b, *options), weight, bias
    if isinstance(module, CONVOLUTIONS):
        return lambda x, w, b: convolved(module, x[0], w, b), weight, bias
    if isinstance(module, BATCH_NORMS):
        if module.running_mean is None or module.running_var is None:
            raise InputError("the relevance of a BatchNorm without running statistics is not defined row by row")
        shape = (-1, *(1,) * (inputs[0].ndim - 2))
        scale = (module.running_var + module.eps).rsqrt() * (1.0 if weight is None else weight)
        shift = -module.running_mean * scale + (0.0 if bias is None else bias)
        return lambda x, w, b: x[0] * w.reshape(shape) + (0 if b is None else b.reshape(shape)), scale, shift
    if isinstance(module, AVERAGES):
        return lambda x, w, b: module.forward(*x), None, None
    raise InputError(f"{type(module).__name__} is not linear in its input: this rule does not apply to it")


def as_it_ran(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """What a rule is given for a module: of a batch norm in training mode the map by the statistics of this batch."""
    if type(module) not in BATCH_NORMS or not module.training:
        return module
    x, weight, bias = inputs[0].detach(), module._parameters["weight"], module._parameters["bias"]
    dims = [dim for dim in range(x.ndim) if dim != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    scale = (variance + module.eps).rsqrt()  # type: ignore[operator]
    scale = scale if weight is None else scale * weight.detach()
    shift = -mean * scale if bias is None else bias.detach() - mean * scale
    shape = (-1, *(1,) * (x.ndim - 2))
    return AffineMap(lambda x, w, b: x[0] * w.reshape(shape) + (0 if b is None else b.reshape(shape)), scale, shift)


def _signed(
    function: Affine, x: Tensor, weight: Tensor | None, bias: Tensor | None, sign: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The sum over inputs of contributions of one sign (and the bias of that sign), and its share-out."""
    up, down = x.clamp_min(0), x.clamp_max(0)
    w_up, w_down = (None, None) if weight is None else (weight.clamp_min(0), weight.clamp_max(0))
    kept = None if bias is None else (bias.clamp_min(0) if sign > 0 else bias.clamp_max(0))
    # Positive contributions come from factors of one sign, negative ones from factors of two.
    with_up, with_down = (w_up, w_down) if sign > 0 else (w_down, w_up)
    if weight is None:
        only = up if sign > 0 else down
        total, back = torch.func.vjp(lambda v: function((v,), None, None), only)
        return total, lambda ratio: only * back(ratio)[0]
    first, back_first = torch.func.vjp(lambda v: function((v,), with_up, kept), up)
    second, back_second = torch.func.vjp(lambda v: function((v,), with_down, None), down)
    return first + second, lambda ratio: up * back_first(ratio)[0] + down * back_second(ratio)[0]


def _by_weight(
    module: nn.Module, inputs: tuple[Tensor, ...], relevance: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    (x,) = inputs
    function, weight, _ = affine(module, inputs)
    if weight is None or isinstance(module, BATCH_NORMS) or weight.ndim < 2:
        raise InputError(f"{type(module).__name__} has no weights between inputs and outputs to share by")
    total, back = torch.func.vjp(lambda v: function((v,), change(weight), None), torch.ones_like(x))
    return (back(ratio(relevance, total, 0.0))[0],)


def ratio(relevance: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """Relevance over total; the total is moved away from zero by epsilon, and zero over zero is zero."""
    moved = total + epsilon * torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    return torch.where(moved == 0, 0.0, relevance / torch.where(moved == 0, 1.0, moved))


#: The rules here that share by what a layer computes, of which :func:`affine` must know all.
BY_WEIGHT = (Epsilon, Gamma, AlphaBeta, ZPlus, WSquare, Flat)


class RuleMapper(Protocol):
    """Chooses the rule of a module; ``None`` for a module it does not know."""

    def __call__(self, name: str, module: nn.Module) -> Rule | None: ...


@dataclass(frozen=True)
class Uniform:
    """One rule for every weighted layer; activations pass relevance, pooling and sums share by epsilon.

    Args:
        rule: the rule of linear layers, convolutions and batch norms.
        convolution: another rule for convolutions.
        names: other rules by module name.
        epsilon: of pooling, sums and batch norms.
    """

    rule: Rule = field(default_factory=Epsilon)
    convolution: Rule | None = None
    names: dict[str, Rule] = field(default_factory=dict)
    epsilon: float = 1e-6

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        if name in self.names:
            return self.names[name]
        if isinstance(module, ACTIVATIONS):
            return Pass()
        if isinstance(module, (*BATCH_NORMS, *AVERAGES)):
            return Epsilon(self.epsilon)
        if isinstance(module, CONVOLUTIONS):
            return self.convolution or self.rule
        return self.rule if isinstance(module, nn.Linear) else None


def EpsilonPlus(epsilon: float = 1e-6, names: dict[str, Rule] | None = None) -> Uniform:
    """Epsilon on linear layers and z-plus on convolutions, the usual composite for image nets."""
    return Uniform(Epsilon(epsilon), convolution=ZPlus(epsilon=epsilon), names=names or {}, epsilon=epsilon)
