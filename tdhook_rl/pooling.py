"""Max pooling on CPU by way of the memory format in which torch has a vector kernel for it.

In a network such as IMPALA's the pooling of contiguous frames takes as long as all convolutions forward. A maximum is
the same number however it is found: outputs and gradients are the same bits, in the same layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdhook_rl.classes import Swapped, swap_class
from tdhook_rl.rows import vmap_level

__all__ = ["PoolingMixin", "quicken_pooling"]

#: Below so many entries the change of format costs more than it gains: measured on CPU for 3 x 3 windows.
ENTRIES = 8192


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


class PoolingMixin(Swapped):
    """An ``nn.MaxPool2d`` of a hooked copy."""

    _shows = False
    return_indices: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if len(args) == 1 and not kwargs else None
        if type(value) is not Tensor or torch.compiler.is_compiling() or self.return_indices or not _gains(value):
            return super().forward(*args, **kwargs)
        if value.requires_grad and torch.is_grad_enabled():
            return _MaxPool.apply(value, self)
        return _pool(self, value, return_indices=False)


def quicken_pooling(policy: nn.Module) -> None:
    """Let the max pooling of a hooked copy take the faster way."""
    for child in list(policy.modules()):
        if type(child) is nn.MaxPool2d:
            swap_class(child, PoolingMixin)


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
    return (found[0].contiguous(), found[1]) if return_indices else found.contiguous()


def _gains(value: Tensor) -> bool:
    cpu = value.device.type == "cpu" and value.numel() >= ENTRIES
    return cpu and value.ndim == 4 and value.is_contiguous() and vmap_level() < 0
