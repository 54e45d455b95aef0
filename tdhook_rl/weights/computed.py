"""Weights that a layer computes when it uses them: norms of weights, pruning masks, parametrisations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import pruned_name

#: A power iteration from a random start is at the norm of the matrix by then.
ITERATIONS = 30


@dataclass(frozen=True)
class ComputedWeight:
    """One weight of a layer that is computed from others.

    Attributes:
        layer: the layer.
        name: of the weight.
        kind: by what it is computed, for messages.
        originals: the names of the layer's own parameters that it is computed from; none of a parametrisation.
        hook: what computes it, before each forward; ``None`` for a parametrisation.
    """

    layer: nn.Module
    name: str
    kind: str
    originals: tuple[str, ...]
    hook: Any = None

    @property
    def is_mask(self) -> bool:
        """Whether it is one parameter times a mask."""
        return isinstance(self.hook, prune.BasePruningMethod)

    @torch.no_grad()
    def effective(self) -> Tensor:
        """The weight as the next forward in eval mode computes it; buffers stay as they are."""
        if self.is_mask:
            return (getattr(self.layer, f"{self.name}_orig") * getattr(self.layer, f"{self.name}_mask")).detach()
        if isinstance(self.hook, SpectralNorm):
            return self.hook.compute_weight(self.layer, do_power_iteration=False).detach()
        if isinstance(self.hook, WeightNorm):
            return self.hook.compute_weight(self.layer).detach()
        with _eval(_chain(self.layer, self.name)):
            return getattr(self.layer, self.name).detach()


class _eval:
    """A block in which a module and all in it are in eval mode."""

    def __init__(self, module: nn.Module, training: bool = False) -> None:
        self.flags = [(child, child.training) for child in module.modules()]
        self.training = training

    def __enter__(self) -> None:
        for child, _ in self.flags:
            child.training = self.training

    def __exit__(self, *error: Any) -> None:
        for child, flag in self.flags:
            child.training = flag


def _chain(layer: nn.Module, name: str) -> Any:
    return layer.parametrizations[name]  # type: ignore[index, call-overload, union-attr]


def computed_weights(layer: nn.Module) -> dict[str, ComputedWeight]:
    """The weights of a layer that torch's own tools compute, by name."""
    found: dict[str, ComputedWeight] = {}
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            found[hook.name] = ComputedWeight(layer, hook.name, "spectral_norm", (f"{hook.name}_orig",), hook)
        elif isinstance(hook, WeightNorm):
            originals = (f"{hook.name}_g", f"{hook.name}_v")
            found[hook.name] = ComputedWeight(layer, hook.name, "weight_norm", originals, hook)
        elif isinstance(hook, prune.BasePruningMethod):
            name = pruned_name(hook)
            found[name] = ComputedWeight(layer, name, "a pruning mask", (f"{name}_orig",), hook)
    if parametrize.is_parametrized(layer):
        for name in layer.parametrizations:  # type: ignore[union-attr]
            chain = _chain(layer, name)
            kinds = ", ".join(type(one).__name__.strip("_") for one in chain)
            found[name] = ComputedWeight(layer, name, f"a parametrisation ({kinds})", ())
    return found


@torch.no_grad()
def draw_anew(path: str, layer: nn.Module, computed: Mapping[str, ComputedWeight]) -> None:
    """Initialise a layer with computed weights as its class does a plain one; masks are lifted.

    Raises:
        InputError: if the weights are computed in a way that cannot be turned round.
    """
    plain = _plain(layer, computed)
    plain.reset_parameters()  # type: ignore[operator]
    for name, parameter in plain._parameters.items():
        if name not in computed:
            if parameter is not None:
                layer._parameters[name].copy_(parameter)
            continue
        one = computed[name]
        if one.is_mask:
            getattr(layer, f"{name}_orig").copy_(parameter)
            getattr(layer, f"{name}_mask").fill_(1)
        elif isinstance(one.hook, SpectralNorm):
            getattr(layer, f"{name}_orig").copy_(parameter)
            for _ in range(ITERATIONS):
                one.hook.compute_weight(layer, do_power_iteration=True)
        elif isinstance(one.hook, WeightNorm):
            getattr(layer, f"{name}_v").copy_(parameter)
            size = getattr(layer, f"{name}_g")  # of each row, say, or one of all
            dims = [dim for dim in range(parameter.ndim) if not size.ndim or size.shape[dim] == 1]
            size.copy_(torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).reshape(size.shape))
        else:
            _assign(path, layer, name, parameter)


def _plain(layer: nn.Module, computed: Mapping[str, ComputedWeight]) -> nn.Module:
    """A layer of the same class and options with parameters of its own, which nothing computes."""
    # The class of a parametrised layer is a subclass that torch has made.
    base = type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
    plain = base.__new__(base)
    nn.Module.__init__(plain)
    own = vars(plain).copy()
    plain.__dict__.update({key: value for key, value in vars(layer).items() if key not in own and key not in computed})
    for name, one in computed.items():
        plain.register_parameter(name, nn.Parameter(one.effective().clone()))
    for name, parameter in layer._parameters.items():
        if not any(name in one.originals for one in computed.values()):
            plain.register_parameter(name, None if parameter is None else nn.Parameter(parameter.detach().clone()))
    return plain


def _assign(path: str, layer: nn.Module, name: str, value: Tensor) -> None:
    chain = _chain(layer, name)
    try:
        setattr(layer, name, value.detach())
    except Exception as error:  # whatever a parametrisation of the user's raises
        raise InputError(
            f"the {name!r} of the layer {path!r} is computed by {', '.join(type(one).__name__ for one in chain)}, "
            f"which cannot be given a new one ({type(error).__name__}: {error}): say how to randomise it with "
            "initialise=, or leave it out with layers=[...]"
        ) from error
    with _eval(chain, training=True):
        for _ in range(ITERATIONS):  # norms that are iterated
            getattr(layer, name)
