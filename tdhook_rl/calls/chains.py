"""Policies that are a chain of known layers, whose derivatives need no graph.

The networks of RL are mostly small multilayer perceptrons, in which module calls and autograd's bookkeeping
take longer than the arithmetic. Where a whole policy is an ``nn.Sequential`` of known layers
(:data:`tdhook_rl.calls.layers.LAYERS`), nested or not, or an actor that is one and then decides
(:mod:`tdhook_rl.calls.heads`), it may be run by their functions, and a :class:`Record` of the run applies what
autograd would. Where anybody listens to a layer, has replaced or changed one, or computes its weights, there is no
chain, and all goes its usual way.

Other modules that only run those that they hold say so: see :func:`tells_of`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential, skip_existing
from torch import Tensor, nn

from tdhook_rl.calls.layers import LAYERS, Layer
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.internals.tensordict_names import CALL_METHODS, has_options, selects
from tdhook_rl.internals.torch_names import call_methods, has_any_global_hook, is_any_autocast_enabled
from tdhook_rl.sites.known import own_class

#: What torch says where a tensor that a derivative needs was changed meanwhile.
MODIFIED = "modified by an inplace operation"

#: Where autocast can be asked for; other devices (meta) know none.
_DEVICES = ("cpu", "cuda", "mps")

_TENSORS = (nn.Parameter, Tensor)

#: Where a weight is kept.
_WEIGHTED = ("weight", "both")

#: What these classes do by themselves; somebody may replace it for a whole class.
_FORWARDS = {kind: kind.forward for kind in LAYERS}
_CALLS = call_methods(nn.Module)

Steps = list[tuple[Layer, nn.Module]]


class Record:
    """One run of a chain: its input and output, and what the derivatives of its layers need.

    Attributes:
        input, output: of the chain.
        head: the pass over what stands behind it, once somebody has begun one.
        pulled: by the ``id`` of a target the target, and its gradient.
    """

    def __init__(self, steps: Steps, x: Tensor) -> None:
        self.input = x
        self.head: Any = None
        self.pulled: dict[int, tuple[Any, Tensor]] = {}
        self._finite: bool | None = None
        self._steps = steps
        kept: list[Any] = []
        versions: list[int] = []
        for layer, module in steps:
            keeps = layer.keeps
            if keeps == "input":
                kept.append(x)
            elif keeps != "output":
                weight: Any = module._parameters["weight"]
                kept.append(weight if keeps == "weight" else (x, weight))
                # Before it is used: a learner may change it meanwhile. Those of inference mode do not count.
                versions.append(-1 if weight.is_inference() else weight._version)
            x = layer.forward(module, x)
            if keeps == "output":
                kept.append(x)
        self.output, self._kept, self._versions = x, kept, versions

    def is_finite(self) -> bool:
        """Whether the output surely is."""
        if self._finite is None:
            self._finite = surely_finite(self.output)
        return self._finite

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input, from that with respect to the output; with gradients off.

        There may be several, in dimensions before those of the output, where it :meth:`stacks`.

        Raises:
            RuntimeError: as autograd does, if a weight was changed since (by a learner in another thread).
        """
        versions = reversed(self._versions)
        for (layer, module), kept in zip(reversed(self._steps), reversed(self._kept), strict=True):
            if layer.keeps in _WEIGHTED:
                weight = kept if layer.keeps == "weight" else kept[1]
                if (version := next(versions)) >= 0 and weight._version != version:
                    raise RuntimeError(f"a weight was {MODIFIED} while its policy was explained")
            gradient = layer.backward(module, gradient, kept)
        return gradient

    def stacks(self) -> bool:
        """Whether it pulls several gradients at once."""
        return all(layer.stacks for layer, _ in self._steps)


def run_chain(steps: Steps, x: Tensor) -> Tensor:
    """What a chain puts out, without a record."""
    for (forward, *_), module in steps:
        x = forward(module, x)
    return x


class Chain(NamedTuple):
    """Where the chain of a policy is, and what stands behind it.

    Attributes:
        module: the TensorDictModule that calls the sequence, the policy itself or the first of its modules.
        splits: the last layer makes the parameters of a distribution of what the others put out.
        head: the module that decides by its outputs; ``None`` in a policy that is nothing but the chain.
        tail: the modules that make something of what was decided.
        around: where the policy is a sequence that begins with another one, this.
    """

    module: TensorDictModule
    splits: bool = False
    head: nn.Module | None = None
    tail: tuple[nn.Module, ...] = ()
    around: nn.Module | None = None


def chain_of(policy: Any) -> Chain | None:
    """The chain that a policy may be: a sequence of modules called on one input, by whose output it may then decide."""
    if _calls_a_sequence(policy) and len(policy.out_keys) == 1:
        return Chain(policy)
    actor, tail, around = policy, (), None
    if own_class(policy) is TensorDictSequential and is_usual(policy) and len(policy.module) > 1:
        actor, *rest = policy.module
        tail, around = tuple(rest), actor
        if own_class(actor) not in actor_classes() or "forward" in actor.__dict__:
            return None
    if own_class(actor) not in actor_classes() or len(actor.module) != 2 or not is_usual(actor):
        return None
    module, head = actor.module
    if not _calls_a_sequence(module) or own_class(head) not in _heads() or not _only_makes(tail, actor, head):
        return None
    layers = list(module.module._modules.values())
    splits = bool(layers) and gives_parameters(layers[-1])
    read = set(module.out_keys) == set(head.in_keys) and set(module.out_keys) <= set(policy.out_keys)
    named = all(isinstance(key, str) and key not in ("_", "action") for key in (*module.in_keys, *module.out_keys))
    fits = read and named and len(module.out_keys) == (2 if splits else 1)
    return Chain(module, splits, head, tail, around) if fits else None


def gives_parameters(layer: Any) -> bool:
    """Whether a layer makes, row by row, the parameters of a distribution of a tensor.

    A class of others says so by ``gives_parameters = True``; a subclass does not.
    """
    return type(layer) is NormalParamExtractor or vars(type(layer)).get("gives_parameters") is True


def _only_makes(tail: Sequence[Any], actor: Any, head: Any) -> bool:
    """Whether modules after an actor make entries of its decision alone, and write over none that is there before.

    What is made of something else may be another decision, of which a target has to say that it is left out.
    """
    known, made = {*actor.in_keys, *actor.out_keys}, set(getattr(head, "dist_sample_keys", head.out_keys[:1]))
    for one in tail:
        if not _is_called_by_tensors(one) or not made >= set(one.in_keys) or not known.isdisjoint(one.out_keys):
            return False
        made |= set(one.out_keys)
        known |= made
    return True


def _calls_a_sequence(module: Any) -> bool:
    """Whether a module is a TensorDictModule that only calls a sequence of modules on one input."""
    if not _is_called_by_tensors(module) or len(module.in_keys) != 1:
        return False
    return isinstance(module.module, nn.Sequential) or hasattr(module.module, "runs_in_order")


def _is_called_by_tensors(module: Any) -> bool:
    """Whether a module is a TensorDictModule that calls what it holds on its entries, and writes what that returns."""
    if not isinstance(module, TensorDictModule):
        return False
    kind, own = own_class(module), module.__dict__
    usual = all(getattr(kind, name) is getattr(TensorDictModule, name) and name not in own for name in CALL_METHODS)
    plain = module.method is None and module.inplace is True and not has_options(module)
    return usual and plain and "_" not in module.out_keys


def is_usual(policy: Any) -> bool:
    """Whether a sequence of modules runs them one after the other, on one TensorDict, whatever happens."""
    return policy.inplace in (True, None) and not policy.partial_tolerant and not selects(policy)


@functools.cache
def actor_classes() -> frozenset[type]:
    import torchrl.modules as rl
    from tensordict.nn import ProbabilisticTensorDictSequential

    safe = rl.SafeProbabilisticTensorDictSequential
    return frozenset([ProbabilisticTensorDictSequential, safe, rl.ProbabilisticActor, rl.QValueActor])


@functools.cache
def _heads() -> frozenset[type]:
    import torchrl.modules as rl
    from tensordict.nn import ProbabilisticTensorDictModule

    return frozenset([ProbabilisticTensorDictModule, rl.SafeProbabilisticModule, rl.QValueModule])


def chain_layers(policy: HookedPolicy, x: Any) -> Steps | None:
    """The layers of the chain of a hooked policy, if it is one for this input and just now."""
    chain, runtime = policy._hooked.chain, policy._hooked.runtime
    if chain is None or type(x) is not Tensor:
        return None
    # Whether autocast is on anywhere is the cheaper question, and mostly answers that of one device.
    if not x.is_cpu and x.device.type not in _DEVICES:
        return None
    if is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return None
    if runtime.row_hook is not None or runtime.expected or skip_existing():
        return None
    if chain.head is not None and has_hook(chain.module.__dict__):
        return None
    if chain.around is not None and has_hook(chain.around.__dict__):
        return None
    steps: Steps = []
    module: Any = chain.module._modules["module"]
    fits = not has_any_global_hook() and _add_layers(module, x, steps, but_last=chain.splits)
    return steps if fits and steps else None


def _add_layers(module: nn.Module, x: Tensor, steps: Steps, but_last: bool = False) -> bool:
    """Add the layers that a module runs one after the other on an input; whether it does that and nothing else."""
    children = _in_order(module, x)
    if children is None:
        return False
    for child in children[:-1] if but_last else children:
        kind, own = child.__class__, child.__dict__
        layer = LAYERS.get(kind)
        if layer is None:
            if not _add_layers(child, x, steps):
                return False
            continue
        if kind.forward is not _FORWARDS[kind] or "forward" in own or own.get("inplace"):
            return False
        # As `has_hook`, whose call would cost more than what it does: this runs for each layer at each step.
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if layer.keeps in _WEIGHTED and not _is_plain(own["_parameters"]):
            return False
        if not layer.stacks:
            if layer.fits is not None and not layer.fits(child):
                return False
            if kind is nn.Flatten and x.ndim == 2 and child.start_dim == 1 and all(one.stacks for one, _ in steps):
                continue  # the layers before it have kept the dimensions: rows of vectors are handed on
        steps.append((layer, child))
    return True


def _in_order(module: nn.Module, x: Tensor) -> Sequence[nn.Module] | None:
    """The modules that a module runs one after the other; ``None`` if it does anything else, or somebody sees it."""
    kind, own = type(module), module.__dict__
    if kind.forward in _sequences() and kind.__iter__ is nn.Sequential.__iter__:  # type: ignore[attr-defined]
        # torchrl's MLP gives its output a shape where it is asked for several dimensions.
        fits = own.get("out_features", 0).__class__ is int and is_called_plainly(module)
        return list(module._modules.values()) if fits else None  # type: ignore[arg-type]
    told = getattr(kind, "runs_in_order", None)
    if told is None or kind.forward is not told.forward or not is_called_plainly(module):
        return None
    return told(module, x)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of a module runs the forward of its class, and nobody listens or has replaced it."""
    own = module.__dict__
    return "forward" not in own and not has_hook(own) and call_methods(type(module)) == _CALLS


Function = TypeVar("Function", bound=Callable[..., Any])


def tells_of(forward: Callable[..., Any]) -> Callable[[Function], Function]:
    """A decorator of the method ``runs_in_order(self, x)`` of a class of modules, beside its ``forward``.

    It returns the modules that ``forward`` runs on a tensor one after the other, if it does nothing else to it, and
    otherwise ``None``. It is believed while the class has this very ``forward``.
    """

    def mark(function: Function) -> Function:
        function.forward = forward  # type: ignore[attr-defined]
        return function

    return mark


@functools.cache
def _sequences() -> tuple[Any, ...]:
    from torchrl.modules import MLP

    return nn.Sequential.forward, MLP.forward


def has_hook(own: dict[str, Any]) -> bool:
    """Whether a module, by its attributes, has a hook."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _is_plain(parameters: dict[str, Any]) -> bool:
    """Whether weight and bias are tensors that are computed from nothing; others have gradients of their own."""
    weight, bias = parameters.get("weight"), parameters.get("bias", parameters)
    if weight is None or weight.__class__ not in _TENSORS or not weight.is_leaf:
        return False
    return bias is None or (bias.__class__ in _TENSORS and bias.is_leaf)
