"""What is added to a site in every call, kept as long as the controls that it is made of hold the same numbers.

In a step of many environments the sum costs less than finding out what to add: where the vector stands in the output,
whether its dtype holds it, whether the strength is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdhook_rl.internals.functorch_names import is_batchedtensor, transform_stack
from tdhook_rl.sites.runtime import Runtime


class _Kept(NamedTuple):
    """An addend, ``None`` where nothing is added, and for which outputs, in which call, of which numbers it is."""

    addend: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    batch: torch.Size | None
    inner: tuple[torch.Size | None, ...]
    numbers: object  # what calls read of the controls: another where one was set


class KeptAddend:
    """The product of two controls, strength and vector, in the place of an output's features.

    Args:
        runtime: what the hooks share.
        alpha, vector: the names of the controls.
    """

    def __init__(self, runtime: Runtime, alpha: str, vector: str) -> None:
        self._runtime = runtime
        self._names = alpha, vector
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # it knows tensors of this process

    def steered(self, output: Any) -> Tensor | None:
        """The output after the addition, in an eager call whose sites have been seen; ``None`` where that is not known.

        That is where it is not of the shape, in the call or of the numbers that what is kept is of.
        """
        kept, runtime = self._kept, self._runtime
        if (
            kept is None
            or type(output) is not Tensor
            or output.is_nested
            or output.shape != kept.shape
            or output.dtype != kept.dtype
        ):
            return None
        if runtime.batch != kept.batch or runtime.inner != kept.inner or not runtime.active or runtime.checks_sites():
            return None
        if runtime.held.numbers is not kept.numbers or not output.is_cpu:
            return None
        return output if kept.addend is None else output + kept.addend

    def keep(self, module: nn.Module, output: Any, shape: torch.Size) -> None:
        """Note what is added to an output, where that is a tensor of the rows as they are, on the CPU.

        Args:
            module: what computed the output.
            output: its output.
            shape: the shape in which the vector stands in the place of the features.
        """
        self._kept, runtime = None, self._runtime
        if type(output) is not Tensor or not (output.is_cpu and (output.is_floating_point() or output.is_complex())):
            return
        if module._hooked_layout is not None or runtime.time_first or transform_stack() or is_batchedtensor(output):
            return
        if runtime.held.numbers is None:
            return
        alpha, vector = (runtime.held[name] for name in self._names)
        if alpha.requires_grad or vector.requires_grad or vector.dtype != output.dtype:
            return
        addend = alpha * vector.reshape(shape) if alpha.item() != 0 else None
        self._kept = _Kept(addend, output.shape, output.dtype, runtime.batch, runtime.inner, runtime.held.numbers)
