"""Guided backpropagation: gradients that pass each ReLU only where they, too, are positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from tdhook_rl.attribution.base import BoundAttribution, Explained
from tdhook_rl.attribution.saliency import Saliency, _BoundSaliency
from tdhook_rl.errors import SiteError
from tdhook_rl.hooks import Runtime, first_tensor
from tdhook_rl.passes import Call, Pass
from tdhook_rl.paths import Site

if TYPE_CHECKING:
    from tdhook_rl.method import Binder

__all__ = ["GuidedBackpropagation"]


class _ClampGradient(torch.autograd.Function):
    """The identity, whose gradient keeps its positive part only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp_min(0)


class _GuideHook:
    """Forward hook of a ReLU that acts while its own method explains."""

    def __init__(self, runtime: Runtime, owner: str) -> None:
        self.runtime = runtime
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.runtime.explaining != self.owner:
            return None
        return _ClampGradient.apply(first_tensor(output, module, "ReLU"))


class _BoundGuidedBackpropagation(_BoundSaliency):
    def __init__(self, config: GuidedBackpropagation, binder: Binder) -> None:
        super().__init__(config, binder)
        self._owner = binder.owner()
        relus = [
            (name, child)
            for name, child in binder.root.named_modules()
            if isinstance(child, nn.ReLU) and not isinstance(child, tuple(config.classes_to_skip))
        ]
        if not relus:
            raise SiteError(
                f"GuidedBackpropagation found no nn.ReLU module in {type(binder.root).__name__}: it changes the "
                "gradient of ReLU modules, and functional ReLUs or other activations cannot be seen; use Saliency"
            )
        for name, child in relus:
            binder.on_output(Site(name, name, child, True), _GuideHook(binder.runtime, self._owner))
        self.shares_forward = False  # the hooks change gradients that the caller's own backward must not see

    def attribute(
        self, call: Call, explained: Explained, targets: Sequence[Callable[[Pass], Tensor]]
    ) -> list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]]:
        with call.policy._hooked_runtime.explained_by(self._owner):
            return super().attribute(call, explained, targets)


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidedBackpropagation(Saliency):
    """Guided backpropagation (Springenberg et al. 2015).

    The gradient is clamped to its positive part at every ``nn.ReLU``, and nowhere else. It passes the sanity check
    of weight randomisation badly (Adebayo et al. 2018): read it as what the features look like, not as evidence of
    what the decision rests on.

    Args:
        classes_to_skip: subclasses of ``nn.ReLU`` that are left as they are.

    The other arguments are those of :class:`tdhook_rl.attribution.Saliency`.

    Raises:
        SiteError: if the net has no ``nn.ReLU`` module.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with GuidedBackpropagation().prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["attr", "input"].shape
        torch.Size([3, 4])
    """

    classes_to_skip: Sequence[type[nn.Module]] = ()

    bound_class: ClassVar[type[BoundAttribution]] = _BoundGuidedBackpropagation
