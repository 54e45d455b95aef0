"""Max pooling on CPU by way of the memory format in which torch has a vector kernel for it.

In a network such as IMPALA's the pooling of contiguous frames takes as long as all convolutions forward. A maximum is
the same number however it is found: outputs and gradients are the same, in the same layout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdhook_rl.internals.torch_names import in_forward_ad
from tdhook_rl.sites.listed import modules
from tdhook_rl.sites.runtime import vmap_level

#: Below so many entries the change of format costs more than it gains: measured on CPU for 3 x 3 windows.
ENTRIES = 8192
_USUAL = nn.MaxPool2d.forward


class _MaxPool(torch.autograd.Function):
    """The maxima are found in one format; the gradient goes where they were in the other, whose kernel is faster."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, module: nn.MaxPool2d) -> Tensor:
        maxima, indices = _pool(module, value, return_indices=True)
        ctx.module = module
        ctx.save_for_backward(value, indices.contiguous())
        return maxima

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        value, indices = ctx.saved_tensors
        module = ctx.module
        window = module.kernel_size, module.stride, module.padding, module.dilation
        sizes = [[size, size] if isinstance(size, int) else size for size in window]
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradient.contiguous(), value, *sizes, module.ceil_mode, indices
        ), None


def speed_up_pooling(policy: nn.Module) -> None:
    """Let the max pooling of a hooked copy take the faster way."""
    for child in modules(policy):
        if type(child) is nn.MaxPool2d and "forward" not in child.__dict__:
            # An attribute of the instance: the class, which the user's code may look at, stays what it is.
            child.__dict__["forward"] = functools.partial(_run, child)


def _run(module: nn.MaxPool2d, *args: Any, **kwargs: Any) -> Any:
    value = args[0] if len(args) == 1 and not kwargs and type(module) is nn.MaxPool2d else None
    if type(value) is not Tensor or torch.compiler.is_compiling() or not _gains(module, value):
        return type(module).forward(module, *args, **kwargs)
    if value.requires_grad and torch.is_grad_enabled():
        return _MaxPool.apply(value, module)
    return _pool(module, value, return_indices=False)


def _pool(module: nn.MaxPool2d, value: Tensor, return_indices: bool) -> Any:
    found = F.max_pool2d(
        value.contiguous(memory_format=torch.channels_last),
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        ceil_mode=module.ceil_mode,
        return_indices=return_indices,
    )
    # Not contiguous(), which lets frames of one place be: in the next convolution they would pass for channels_last.
    if return_indices:
        return found[0].clone(memory_format=torch.contiguous_format), found[1]
    return found.clone(memory_format=torch.contiguous_format)


def _gains(module: nn.MaxPool2d, value: Tensor) -> bool:
    if torch.jit.is_tracing() or in_forward_ad() or vmap_level() >= 0:
        return False
    usual = nn.MaxPool2d.forward is _USUAL and not module.return_indices
    frames = value.ndim == 4 and value.device.type == "cpu" and value.is_floating_point() and value.is_contiguous()
    # Frames of one channel or place are contiguous in both formats, and keep the one that their strides say.
    both = frames and value.is_contiguous(memory_format=torch.channels_last)
    return usual and frames and not both and value.numel() >= ENTRIES
