"""Chains of layers whose derivatives are known: they run without module calls and are explained without a graph.

The policies of RL are mostly small multilayer perceptrons, in which calls and autograd's bookkeeping take longer than
the arithmetic. In a hooked copy an ``nn.Sequential`` of the layers of :data:`LAYERS` calls their functions directly;
and while its input is being explained, a :class:`Tape` keeps what each layer's derivative needs and applies the
operations that autograd would. A layer that anybody has hooked, replaced or changed runs as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from tdhook_rl.classes import Swapped, swap_class

if TYPE_CHECKING:
    from tensordict.nn import TensorDictModuleBase

    from tdhook_rl.hooks import Runtime

__all__ = ["LAYERS", "ChainMixin", "Layer", "Tape", "is_chain", "quicken_chains"]

_aten = torch.ops.aten


class Layer(NamedTuple):
    """What a layer computes, and how it hands a gradient on.

    Attributes:
        forward: ``(module, x) -> y``.
        backward: ``(module, gradient, kept) -> gradient``, with autograd's own operations.
        keeps: what ``backward`` is given: the layer's ``"input"``, ``"output"``, or ``"weight"``.
    """

    forward: Callable[[Any, Tensor], Tensor]
    backward: Callable[[Any, Tensor, Tensor], Tensor]
    keeps: str


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    own = module._parameters
    if "weight" in own and "bias" in own:  # a look at the dictionary is cheaper than module.weight
        return F.linear(x, own["weight"], own["bias"])
    return module.forward(x)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight  # type: ignore[return-value]


def _version(value: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not count."""
    return -1 if value.is_inference() else value._version


#: The layers by their exact class: a subclass may compute something else.
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(_linear, lambda m, g, w: g.matmul(w), "weight"),
    nn.ReLU: Layer(lambda m, x: torch.relu(x), lambda m, g, y: _aten.threshold_backward.default(g, y, 0), "output"),
    nn.Tanh: Layer(lambda m, x: torch.tanh(x), lambda m, g, y: _aten.tanh_backward.default(g, y), "output"),
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
}

Steps = list[tuple[Layer, nn.Module]]


class Record:
    """One run of a chain: its input and output, and what the derivatives of its layers need."""

    def __init__(self, steps: Steps, x: Tensor) -> None:
        self.input = x
        self._steps = steps
        self._kept: list[Tensor] = []
        self._versions: list[int] = []

    def run(self) -> Tensor:
        value = self.input
        for (forward, _, keeps), module in self._steps:
            if keeps == "weight":
                self._keep(_weight(module))  # before it is used: a learner may change it meanwhile
            elif keeps == "input":
                self._keep(value)
            value = forward(module, value)
            if keeps == "output":
                self._keep(value)
        self.output = value
        self._version = _version(value)
        return value

    def _keep(self, value: Tensor) -> None:
        self._kept.append(value)
        self._versions.append(_version(value))

    def came_to(self, output: Any) -> bool:
        """Whether ``output`` is what the chain has computed, as it was."""
        return output is self.output and _version(output) == self._version

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input, from that with respect to the output; with gradients off.

        Raises:
            RuntimeError: as autograd does, if a weight has changed since (a learner in another thread).
        """
        if self._versions != [_version(value) for value in self._kept]:
            raise RuntimeError("a weight was modified by an inplace operation while its policy was explained")
        for ((_, backward, _), module), kept in zip(reversed(self._steps), reversed(self._kept), strict=True):
            gradient = backward(module, gradient, kept)
        return gradient


class Tape:
    """What chains computed from explained tensors in one pass.

    Args:
        points: the tensors that are explained; the chains that read another one are not recorded.
        cut: hand out each chain's output as a leaf of the graph instead of one that depends on the weights, so that
            no graph of the chain is made.
    """

    def __init__(self, points: Sequence[Tensor], cut: bool) -> None:
        self.points = points
        self.cut = cut
        self.records: list[Record] = []

    @contextmanager
    def recording(self, runtime: Runtime) -> Iterator[None]:
        """Let the chains of a hooked copy record on this tape."""
        previous, runtime.tape = runtime.tape, self
        try:
            yield
        finally:
            runtime.tape = previous

    def takes(self, x: Any) -> bool:
        for point in self.points:  # a generator would cost more than the comparison
            if x is point:
                return not torch.is_autocast_enabled(x.device.type)
        return False

    def run(self, steps: Steps, x: Tensor) -> Tensor:
        record = Record(steps, x)
        if self.cut:
            with torch.no_grad():
                record.run()
            record.output = record.output.detach().requires_grad_()
            output = record.output.clone()  # what follows may change it in place
        else:
            output = record.run()
        self.records.append(record)
        return output

    def only(self, output: Any) -> Record | None:
        """The record of the one chain, if ``output`` is what it has computed."""
        return self.records[0] if len(self.records) == 1 and self.records[0].came_to(output) else None

    def pull(self, point: Tensor, gradient: Tensor | None, of_outputs: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of a point: what autograd found, and what goes through the chains that read it."""
        for record, outer in zip(self.records, of_outputs, strict=True):
            if record.input is point and outer is not None:
                with torch.no_grad():
                    through = record.pull(outer)
                gradient = through if gradient is None else gradient + through
        return gradient


if TYPE_CHECKING:
    # What the mixin is mixed with: lets the checker see the methods that super() finds.
    class _Sequential(Swapped, nn.Sequential):
        pass
else:
    _Sequential = Swapped


class ChainMixin(_Sequential):
    """An ``nn.Sequential`` of a hooked copy."""

    _shows = False
    _hooked_runtime: Runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        steps = self._steps()
        if steps is None:
            return super().forward(*args)
        (value,) = args
        tape = self._hooked_runtime.tape
        if tape is not None and tape.takes(value):
            return tape.run(steps, value)
        for layer, module in steps:
            value = layer.forward(module, value)
        return value

    def _steps(self) -> Steps | None:
        """The layers, if all are known, and nobody listens to or has changed one."""
        if not self._modules or self._backward_hooks or self._backward_pre_hooks or _has_any_global_hook():
            return None
        steps = []
        for module in self._modules.values():
            layer = LAYERS.get(type(module))
            if layer is None or module._forward_hooks or module._forward_pre_hooks:
                return None
            if module._backward_hooks or module._backward_pre_hooks:
                return None
            own = module.__dict__
            if "forward" in own or own.get("inplace", False):
                return None
            steps.append((layer, module))
        return steps


def quicken_chains(policy: nn.Module, runtime: Runtime) -> None:
    """Make chains of the sequential modules below the root of a hooked copy."""
    from torchrl.modules import MLP

    for child in policy.modules():
        forward = type(child).forward
        # torchrl's MLP gives its output a shape where it is asked for several dimensions.
        reshapes = forward is MLP.forward and not isinstance(child.out_features, int)
        if forward in (nn.Sequential.forward, MLP.forward) and not reshapes:
            swap_class(child, ChainMixin)
            child.__dict__["_hooked_runtime"] = runtime


def is_chain(policy: TensorDictModuleBase) -> bool:
    """Whether a policy is a chain and nothing else: its one output is what that computes from its one input."""
    if not isinstance(policy, TensorDictModule) or type(policy).forward is not TensorDictModule.forward:
        return False
    chain = policy.module
    known = isinstance(chain, ChainMixin) and not chain._forward_hooks and chain._steps() is not None
    return known and len(policy.in_keys) == len(policy.out_keys) == 1 and policy.method is None
