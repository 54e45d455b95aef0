"""Saliency: the gradient of what the policy decided with respect to what it saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution, compiled
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.question import Attributed, Question
from tdhook_rl.method import Binder
from tdhook_rl.sites.numbers import first_order


class _BoundSaliency(BoundAttribution):
    def __init__(self, config: Saliency, binder: Binder) -> None:
        super().__init__(config, binder)
        self._absolute = config.absolute
        self.is_product = config.multiply_by_inputs
        # A function of the user's may write in place to what it is given, or use the graph up.
        self.shares_forward = config.init_attr_inputs is None and self._own_targets
        self.compiled = compiled(self, config)
        self.shares_pass = type(self) is _BoundSaliency and self.shares_forward and not self.leaves

    def attribute(self, question: Question) -> list[Attributed]:
        found, inner = gradients(question)
        return [
            (
                {key: self._finish(value, question.inputs[key]) for key, value in of_inputs.items()},
                {slot: self._finish(value, inner[slot]) for slot, value in of_leaves.items()},
            )
            for of_inputs, of_leaves in found
        ]

    def _finish(self, gradient: Tensor, value: Tensor) -> Tensor:
        if self.is_product:
            value = value.detach()
            # What a closed action is told by has no slope: a logit of minus infinity adds nothing.
            gradient = first_order(gradient, value).masked_fill((gradient == 0) & value.isinf(), 0)
        return gradient.abs() if self._absolute else gradient


@dataclass(frozen=True, eq=False, kw_only=True)
class Saliency(GradientAttribution):
    """Gradient saliency (Simonyan et al. 2014) of inputs and of inner activations.

    Args:
        absolute: take the absolute value.
        multiply_by_inputs: multiply by the explained value (gradient times input).
        compile: compute by a graph of ``torch.compile``, ``True`` or its arguments, such as
            ``{"backend": "aot_eager"}``: for large batches and networks whose passes are repeated often. What compiling
            took is logged; what cannot be compiled is computed without, with a warning.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`.

    Writes ``(attribution_key, in_key)`` and ``(attribution_key, path)``: batch + the shape of what is
    explained. Per step and per batch give the same numbers.

    Raises:
        TargetError: if no gradient reaches the target.
        InputError: for index inputs (tokens), which have no gradient.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> with Saliency().prepare(nn.Linear(4, 1)) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["attr", "input"].shape
        torch.Size([3, 4])
    """

    absolute: bool = False
    multiply_by_inputs: bool = False
    compile: bool | Mapping[str, Any] = False

    bound_class: ClassVar[type[BoundAttribution]] = _BoundSaliency
    horizons: ClassVar[tuple[str, ...]] = ("step", "trajectory")
