"""Chains of layers whose derivatives are known: they run without module calls and are explained without a graph.

The policies of RL are mostly small multilayer perceptrons, in which calls and autograd's bookkeeping take longer than
the arithmetic. In a hooked copy an ``nn.Sequential`` of the layers of :data:`LAYERS` that a TensorDictModule calls
runs by their functions; and while its input is being explained, a :class:`Record` keeps what the derivative of each
layer needs and applies the operations that autograd would. Where anybody listens to a layer, or has replaced or changed
one, all run as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from tdhook_rl.rows import vmap_level

if TYPE_CHECKING:
    from tdhook_rl.hooks import Runtime

__all__ = ["LAYERS", "MODIFIED", "TWICE", "Chain", "Layer", "Record", "Tape", "chain_of", "quicken_chains"]

_aten = torch.ops.aten

#: What torch says where a tensor that a derivative needs was changed meanwhile, and what is said here where a chain
#: that is one node of the graph is differentiated twice.
MODIFIED = "modified by an inplace operation"
TWICE = "a recorded chain is differentiated twice"

#: Where autocast can be asked for; other devices (meta) know none.
_DEVICES = ("cpu", "cuda", "mps")


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
    own = module._parameters  # a look at the dictionary is cheaper than module.weight
    return F.linear(x, own["weight"], own["bias"])


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
#: What these classes do by themselves; somebody may replace it for a whole class.
_FORWARDS = {kind: kind.forward for kind in LAYERS}

Steps = list[tuple[Layer, nn.Module]]


class Record:
    """One run of a chain: its input and output, and what the derivatives of its layers need."""

    def __init__(self, steps: Steps, x: Tensor) -> None:
        self.input = x
        self._steps = steps
        self._kept: list[Tensor] = []
        self._versions: list[int] = []
        for (forward, _, keeps), module in steps:
            if keeps == "input":
                self._kept.append(x)
            elif keeps == "weight":
                weight: Any = module._parameters["weight"]
                self._kept.append(weight)
                # Before it is used: a learner may change it meanwhile. Those of inference mode do not count.
                self._versions.append(-1 if weight.is_inference() else weight._version)
            x = forward(module, x)
            if keeps == "output":
                self._kept.append(x)
        self.output = x

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input, from that with respect to the output; with gradients off.

        Raises:
            RuntimeError: as autograd does, if a weight was changed since (by a learner in another thread).
        """
        device = gradient.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.pull(gradient)
        versions = reversed(self._versions)
        for ((_, backward, keeps), module), kept in zip(reversed(self._steps), reversed(self._kept), strict=True):
            if keeps == "weight" and (version := next(versions)) >= 0 and kept._version != version:
                raise RuntimeError(f"a weight was {MODIFIED} while its policy was explained")
            gradient = backward(module, gradient, kept)
        return gradient

    def joined(self, x: Tensor) -> Tensor:
        """The output as a function of ``x``, a tensor with the numbers of the input, for a graph that goes on."""
        return _Joined.apply(x, self)


class _Joined(torch.autograd.Function):
    """A chain as one node of a graph. What follows is given a copy, which it may change in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Record) -> Tensor:
        ctx.record = record
        return record.output.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # with create_graph=True: a module of the policy differentiates by itself
            raise RuntimeError(TWICE)
        return ctx.record.pull(gradient), None


class Tape:
    """What the chains of a hooked copy compute from explained tensors, in the pass inside its ``with`` block.

    Args:
        runtime: the runtime of the hooked copy.
        points: the tensors that are explained; the chains that read another one are not recorded.
        alone: the layers of the one chain that is the whole of a policy, whose output then keeps the graph of the
            weights, if there is one. Without, each chain becomes one node of the graph.
    """

    def __init__(self, runtime: Runtime, points: Sequence[Tensor], alone: Steps | None = None) -> None:
        self.points = points
        self.alone = alone
        self.records: list[Record] = []
        self._runtime = runtime

    def __enter__(self) -> Tape:
        self._previous, self._runtime.tape = self._runtime.tape, self
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.tape = self._previous

    def takes(self, x: Any) -> bool:
        """Whether a chain that reads ``x`` is recorded."""
        for point in self.points:  # a generator would cost more than the comparison
            if x is point:
                device = x.device.type
                plain = device in _DEVICES and not torch.is_autocast_enabled(device)
                return plain and (self.alone is not None or vmap_level() < 0)
        return False

    def run(self, steps: Steps, x: Tensor) -> Tensor:
        """Run a chain and record it."""
        if self.alone is not None:
            record = Record(steps, x)
            self.records.append(record)
            return record.output
        with torch.no_grad():
            record = Record(steps, x)
        self.records.append(record)
        return record.joined(x)

    def only(self, output: Any) -> Record | None:
        """The record of the one chain, if ``output`` is what it has computed."""
        return self.records[0] if len(self.records) == 1 and self.records[0].output is output else None


class Chain:
    """The forward of an ``nn.Sequential`` of a hooked copy.

    It is an attribute of the instance: the class, which the user's code may look at, stays what it is.
    """

    def __init__(self, module: nn.Sequential, runtime: Runtime) -> None:
        self.module = module
        self.runtime = runtime
        self._usual = type(module).forward
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if len(args) != 1 or kwargs or forward is not self._usual or torch.compiler.is_compiling():
            return forward(self.module, *args, **kwargs)
        tape, (value,) = self.runtime.tape, args
        steps = self.layers() if tape is None or tape.alone is None else tape.alone
        if steps is None:
            return forward(self.module, value)
        if tape is not None and tape.takes(value):
            return tape.run(steps, value)
        for layer, child in steps:
            value = layer.forward(child, value)
        return value

    def layers(self) -> Steps | None:
        """The layers, if all are known, and nobody listens to or has changed one."""
        if list(self.module._modules.values()) != self._children:
            self._survey()
        if not self._steps or any(self._hooks) or _has_any_global_hook():
            return None
        for child, kind, own in self._owners:
            if child.__class__ is not kind or "forward" in own or own.get("inplace", False):
                return None
        for kind in self._kinds:
            if kind.forward is not _FORWARDS[kind]:
                return None
        for parameters in self._parameters:
            # Weights that are computed from something have a gradient of their own.
            weight, bias = parameters.get("weight"), parameters.get("bias", parameters)
            if bias is parameters or weight is None or not weight.is_leaf or not (bias is None or bias.is_leaf):
                return None
        return self._steps

    def alone(self) -> Steps | None:
        """The layers, if besides nobody listens to the chain itself, or changes what it is given."""
        return None if self.module._forward_hooks or self.module._forward_pre_hooks else self.layers()

    def _forget(self) -> None:
        self._children: list[nn.Module] = []
        self._steps: Steps = []

    def _survey(self) -> None:
        """Note where each look has to go: at every call, that has to be short."""
        self._children = children = list(self.module._modules.values())
        known = all(type(child) in LAYERS for child in children)
        self._steps = [(LAYERS[type(child)], child) for child in children] if known else []
        self._owners = [(child, type(child), child.__dict__) for child in children]
        self._kinds = {type(child) for child in children}
        self._parameters = [child._parameters for layer, child in self._steps if layer.keeps == "weight"]
        # These are filled and emptied in place.
        self._hooks = [
            hooks
            for child in children
            for hooks in (child._forward_hooks, child._forward_pre_hooks, *_backward_hooks(child))
        ] + _backward_hooks(self.module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "runtime": self.runtime, "_usual": self._usual}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()  # what was noted belongs to the modules that were copied


def _backward_hooks(module: nn.Module) -> list[dict]:
    return [module._backward_hooks, module._backward_pre_hooks]


def quicken_chains(policy: nn.Module, runtime: Runtime) -> None:
    """Let the sequential modules that TensorDictModules of a hooked copy call run as chains.

    Those that other modules call are left alone: their forward may do anything with them.
    """
    for child in policy.modules():
        if isinstance(child, TensorDictModule) and _calls_its_module(child):
            _quicken(child.module, runtime)


def chain_of(policy: Any) -> Chain | None:
    """The chain that is the whole of a policy: its one output is what that computes from its one input."""
    if not isinstance(policy, TensorDictModule) or not _calls_its_module(policy):
        return None
    chain = policy.module.__dict__.get("forward")
    return chain if isinstance(chain, Chain) and len(policy.in_keys) == len(policy.out_keys) == 1 else None


def _calls_its_module(module: TensorDictModule) -> bool:
    kind = type(module)
    usual = kind.forward is TensorDictModule.forward and kind._call_module is TensorDictModule._call_module
    return usual and module.method is None


def _quicken(module: nn.Module, runtime: Runtime) -> None:
    from torchrl.modules import MLP

    kind: Any = type(module)
    forward = kind.forward
    if forward not in (nn.Sequential.forward, MLP.forward) or kind.__iter__ is not nn.Sequential.__iter__:
        return
    if "forward" in module.__dict__ or (forward is MLP.forward and not isinstance(module.out_features, int)):
        return  # somebody's own forward, or one that gives its output a shape
    module.__dict__["forward"] = Chain(module, runtime)  # type: ignore[arg-type]
    for child in module.children():
        _quicken(child, runtime)
