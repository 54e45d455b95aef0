"""Grad-CAM: channels of an inner activation, weighted by how much the target depends on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import Checked
from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.question import Attributed, Question
from tdhook_rl.calls.passes import Call, with_batch
from tdhook_rl.errors import InputError
from tdhook_rl.method import Binder
from tdhook_rl.sites.numbers import first_order


@dataclass(frozen=True)
class DimsConfig(metaclass=Checked):
    """Dimensions of an activation: over which gradients are averaged, and over which weighted channels are summed.

    Args:
        weight_pooling_dims: averaged over, such as rows and columns; ``None`` for none.
        feature_sum_dims: summed over, such as channels; ``None`` for none.

    Negative numbers count from the end and hold for any batch shape. Positive ones count from the start of an
    activation with one batch dimension, as in ``(batch, channels, rows, columns)``.
    """

    weight_pooling_dims: int | Sequence[int] | None = (-2, -1)
    feature_sum_dims: int | Sequence[int] | None = (-3,)

    def __post_init__(self) -> None:
        for name in ("weight_pooling_dims", "feature_sum_dims"):
            object.__setattr__(self, name, _dims(getattr(self, name), name))


def _dims(dims: object, name: str) -> tuple[int, ...]:
    given = dims
    dims = [plain_number(one) for one in dims] if isinstance(dims, (tuple, list)) else plain_number(dims)
    if dims is None:
        dims = ()
    elif isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        raise InputError(f"DimsConfig({name}=...) takes dimensions such as (-2, -1), one of them, or None: {given!r}")
    return tuple(dims)


class _BoundGradCAM(BoundAttribution):
    def __init__(self, config: GradCAM, binder: Binder) -> None:
        super().__init__(config, binder)
        self._dims = {
            site.name: dims
            for pattern, dims in config.modules_to_attribute.items()
            for site in binder.sites(pattern, runs=True)
        }
        self._relu = config.relu
        self._absolute = config.absolute
        self._upsample = config.upsample_to

    def attribute(self, question: Question) -> list[Attributed]:
        found, inner = gradients(question._replace(inputs={}))
        sites, call = question.sites, question.call
        return [
            ({}, {slot: self._map(gradient, inner[slot], sites[slot], call) for slot, gradient in of_leaves.items()})
            for _, of_leaves in found
        ]

    def _map(self, gradient: Tensor, value: Tensor, site: str, call: Call) -> Tensor:
        batch = call.batch_size
        gradient, value = (with_batch(tensor, batch, site) for tensor in (gradient, value))
        dims = self._dims[site]
        leading = len(batch) + site.endswith("@all")  # the runs of a module stand behind the batch
        pooled = _from_the_end(dims.weight_pooling_dims, value, leading, site)
        summed = _from_the_end(dims.feature_sum_dims, value, leading, site)
        weights = gradient.mean(pooled, keepdim=True) if pooled else gradient
        weighted = first_order(weights, value)
        found = weighted.sum(summed) if summed else weighted
        found = found.relu() if self._relu else found
        found = found.abs() if self._absolute else found
        return found if self._upsample is None else _upsample(found, self._upsample, leading, site)


@dataclass(frozen=True, eq=False, kw_only=True)
class GradCAM(GradientAttribution):
    """Grad-CAM (Selvaraju et al. 2017) at inner modules.

    Args:
        modules_to_attribute: for each module path, which dimensions are pooled and summed.
        relu: keep positive evidence only, as in the paper; off by default, since negative evidence matters in RL.
        absolute: take the absolute value.
        upsample_to: rows and columns that the map is interpolated to (bilinear), such as the observation's.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`; inputs are not
    explained.

    Writes ``(attribution_key, path)``: batch + what is left after summing, rows and columns for images.

    Example:
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> with GradCAM(modules_to_attribute={"1": DimsConfig()}).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 1, 8, 8)}, batch_size=3))
        >>> data["attr", "1"].shape
        torch.Size([3, 6, 6])
    """

    modules_to_attribute: Mapping[str, DimsConfig] | None = field(default=None, kw_only=False)
    relu: bool = False
    absolute: bool = False
    upsample_to: tuple[int, int] | None = None

    bound_class: ClassVar[type[BoundAttribution]] = _BoundGradCAM

    def __post_init__(self) -> None:
        super().__post_init__()
        modules = self.modules_to_attribute
        if not isinstance(modules, Mapping) or not modules:
            raise InputError(f"GradCAM needs modules_to_attribute={{path: DimsConfig(...)}}, got {modules!r}")
        for path, dims in modules.items():
            if not isinstance(dims, DimsConfig):
                raise InputError(f"modules_to_attribute[{path!r}] is a DimsConfig(...), got {dims!r}")
        own = tuple(modules)  # which dataclasses.replace hands on
        if self.inputs is not None or self.input_modules not in ((), own) or self.init_attr_inputs is not None:
            raise InputError("GradCAM explains modules_to_attribute; inputs= and input_modules= belong to Saliency")
        object.__setattr__(self, "input_modules", own)


def _from_the_end(dims: Sequence[int], value: Tensor, batch_dims: int, site: str) -> list[int]:
    """Dimensions as negative numbers, checked against the features of the activation."""
    features = value.ndim - batch_dims
    found = [dim if dim < 0 else dim - 1 - features for dim in dims]
    wrong = [dim for dim, end in zip(dims, found, strict=True) if not -features <= end <= -1]
    if wrong:
        raise InputError(
            f"GradCAM at {site!r} was given dimension {wrong[0]}, but the activation has {features} feature "
            f"dimensions (shape {tuple(value.shape)}): use -{features} to -1, or 1 to {features}"
        )
    return found


def _upsample(found: Tensor, size: tuple[int, int], batch_dims: int, site: str) -> Tensor:
    if found.ndim - batch_dims != 2:
        raise InputError(f"upsample_to= needs maps of rows and columns, but {site!r} gives {tuple(found.shape)}")
    maps = found.reshape(-1, 1, *found.shape[-2:])
    resized = torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return resized.reshape((*found.shape[:-2], *size))
