"""What is used of the insides of torch, ``torch.func`` and ``torch.compile`` aside."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, distributions, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.modules import module as _modules
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.nn.modules.padding import _CircularPadNd as CircularPadNd
from torch.nn.modules.padding import _ConstantPadNd as ConstantPadNd
from torch.nn.modules.padding import _ReflectionPadNd as ReflectionPadNd
from torch.nn.modules.padding import _ReplicationPadNd as ReplicationPadNd
from torch.nn.utils.prune import BasePruningMethod
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

__all__ = [
    "BackwardHookFunction",
    "BatchNorm",
    "CircularPadNd",
    "ConstantPadNd",
    "ConvNd",
    "DisableTorchFunction",
    "DropoutNd",
    "ReflectionPadNd",
    "ReplicationPadNd",
    "TorchDispatchMode",
    "call_methods",
    "cholesky_factor",
    "convolved",
    "copy_all_",
    "draw_attention",
    "function_of",
    "has_any_global_hook",
    "held_buffers",
    "held_parameters",
    "hooks_made",
    "in_forward_ad",
    "is_any_autocast_enabled",
    "network_initialiser",
    "parse_to",
    "pruned_name",
    "pytree",
    "saved_tensors_hooks_on",
    "storage_id",
    "take_forward_hooks",
    "turn_saved_tensors_hooks_on",
]

# `BackwardHookFunction`: the identity around modules with full backward hooks, which the public call does not name.
# `BatchNorm`, `ConvNd`, `DropoutNd`, `...PadNd`: the classes that those of 1, 2 and 3 dimensions, and the lazy ones,
# have in common; a list of the public ones would miss the next. `pytree`: how torch itself takes nested values apart
# and puts them together, classes that were registered for it included. `TorchDispatchMode`: documented, under a private
# path.

#: Code in which torch functions are not seen by a ``TorchFunctionMode``; the public ``DisableTorchFunctionSubclass``
#: leaves the modes on.
DisableTorchFunction: Any = torch._C.DisableTorchFunction

#: What the calls of a class of modules pass, ``(__call__, _call_impl)``: a tracer, or a tool, may have replaced either.
call_methods = attrgetter("__call__", "_call_impl")

#: What ``module.to(...)`` understands of its arguments, ``(device, dtype, non_blocking, format)``, in all its forms.
parse_to: Any = torch._C._nn._parse_to

#: Whether autocast is on for any device: the public question is about one.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled

#: Whether hooks on saved tensors (checkpoints) are on: the public ``disable_saved_tensors_hooks`` cannot ask.
saved_tensors_hooks_on: Any = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
#: To turn them on: a compiler that has failed inside of a gradient leaves them off in the whole process.
turn_saved_tensors_hooks_on = torch._C._autograd._saved_tensors_hooks_enable

#: ``(targets, sources)``: ``copy_`` of many tensors in one call, as torch's optimisers make it.
copy_all_ = torch._foreach_copy_


def held_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the modules of a network hold, by name, each once.

    Some override ``named_parameters`` or ``parameters``: without ``recurse``, for those that are trained only, with
    groups for an optimiser. torch's own method is asked, past these."""
    return dict(nn.Module.named_parameters(module))


def held_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that they hold, past overridden methods likewise."""
    return dict(nn.Module.named_buffers(module))


def hooks_made() -> int:
    """How many hooks torch has registered in this process: where it is as it was, no module has got one since.

    Looking at the hooks of every module takes as long as a layer.
    """
    return RemovableHandle.next_id


def has_any_global_hook() -> bool:
    """Whether a hook is on all modules, which torch has calls to add and none to ask for."""
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def take_forward_hooks(module: nn.Module) -> tuple[list[tuple[Any, bool]], list[tuple[Any, bool, bool]]]:
    """Take away the hooks of a module, before and after its forward, which torch only gives back one by one.

    With each, whether it is given the keyword arguments; and of those after it whether it is called after an error too.
    """
    named, named_after = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs
    always = module._forward_hooks_always_called
    before = [(hook, number in named) for number, hook in module._forward_pre_hooks.items()]
    after = [(hook, number in named_after, number in always) for number, hook in module._forward_hooks.items()]
    for store in (module._forward_pre_hooks, module._forward_hooks, named, named_after, always):
        store.clear()
    return before, after


def in_forward_ad() -> bool:
    """Whether the caller is within a ``torch.autograd.forward_ad.dual_level()``, which has no question."""
    return forward_ad._current_level >= 0


def storage_id(tensor: Tensor) -> int:
    """What is the same number for tensors of one storage; unlike ``data_ptr``, also for empty and fake ones."""
    return tensor.untyped_storage()._cdata


def function_of(node: Node) -> type | None:
    """The ``torch.autograd.Function`` that a node of the graph comes from; ``None`` for one of torch's own operations.

    The name of the node, which is public, is also that of any other function of this name.
    """
    return getattr(type(node), "_forward_cls", None)


def convolved(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution computes with another weight and bias, its padding modes included; ``forward`` takes none."""
    return module._conv_forward(x, weight, bias)  # type: ignore[operator]


def cholesky_factor(distribution: distributions.MultivariateNormal) -> Tensor:
    """``scale_tril`` before it is expanded to the batch, as ``rsample`` multiplies it: the same bits of one sample."""
    return distribution._unbroadcasted_scale_tril


def draw_attention(layer: nn.MultiheadAttention) -> None:
    """Give an attention the weights that a new one has; it is the one layer of torch without ``reset_parameters()``."""
    layer.out_proj.reset_parameters()
    layer._reset_parameters()


def network_initialiser(network: nn.Module) -> Callable[[nn.Module], Any] | None:
    """What a network does to each of its layers when it is made, by the name that ``transformers`` has for it and code
    in its manner; ``None`` where it has none."""
    found = getattr(network, "_init_weights", None)
    return found if callable(found) else None


def pruned_name(hook: BasePruningMethod) -> str:
    """The parameter that a pruning method of torch masks; the method is public, its parameter's name is not."""
    return hook._tensor_name
