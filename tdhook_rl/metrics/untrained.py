"""The network before it was trained: the same modules with weights drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, listed
from tdhook_rl.policies.tying import whole_copy
from tdhook_rl.weights.computed import ComputedWeight, computed_weights, draw_anew


@checked
def untrained_copy(module: nn.Module, *, seed: int = 0) -> Any:
    """A copy of a policy or network whose layers are initialised anew by their ``reset_parameters()``.

    What an untrained network of the same shape lets one read is what a probe of the trained one is held against: much
    of what can be read was never learnt. The module is not touched, and the global generators are as before.

    Args:
        module: a policy or network, not hooked.
        seed: of the new weights.

    Raises:
        InputError: for modules with parameters and without ``reset_parameters()``, by name.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> other = untrained_copy(net)
        >>> other[0].weight.shape == net[0].weight.shape, torch.equal(other[0].weight, net[0].weight)
        (True, False)
    """
    own = whole_copy(module, "untrained_copy initialises")
    layers = dict(_owner(own, path, layer) for path, layer in own.named_modules() if has_parameters(path, layer))
    unknown = [
        f"{path or '(root)'} ({type(layer).__name__})" for path, layer in layers.items()
        if not callable(getattr(layer, "reset_parameters", None))
    ]  # fmt: skip
    if unknown:
        raise InputError(
            f"no untrained copy of {type(module).__name__}: {listed(unknown, 5)} has parameters and no "
            "reset_parameters(); give the untrained network yourself, untrained=copy.deepcopy(policy) before training"
        )
    with own_generators(seed):
        for path, layer in layers.items():
            computed = computed_weights(layer)
            if computed:
                draw_anew(path, layer, computed)
            else:
                layer.reset_parameters()  # type: ignore[operator]
    return own


def _owner(root: nn.Module, path: str, layer: nn.Module) -> tuple[str, nn.Module]:
    """The module that initialises the parameters: of a TensorDict of them, as TorchRL's multi-agent networks have, the
    one that holds it."""
    while isinstance(layer, TensorDictParams) and path:
        path = path.rpartition(".")[0]
        layer = root.get_submodule(path)
    return path, layer


def has_parameters(path: str, layer: nn.Module) -> bool:
    """Whether a layer has weights of its own."""
    if "parametrizations" in path.split("."):
        return False  # what a layer's weight is computed by is no layer
    return any(one is not None for one in layer._parameters.values()) or is_parametrized(layer)


def initialise_layer(path: str, layer: nn.Module, initialise: Callable[[nn.Module], Any] | None) -> None:
    """Initialise one layer, by its own ``reset_parameters()`` unless told otherwise.

    Raises:
        InputError: if it cannot be, or has the same weights afterwards.
    """
    computed = computed_weights(layer)
    before = _weights(layer, computed)
    if initialise is not None:
        initialise(layer)
    else:
        if not callable(getattr(layer, "reset_parameters", None)):
            raise InputError(
                f"the layer {path!r} ({type(layer).__name__}) has no reset_parameters(): say how to randomise it with "
                "initialise=, or leave it out with layers=[...]"
            )
        if computed:
            draw_anew(path, layer, computed)
        else:
            layer.reset_parameters()  # type: ignore[operator]
    after = _weights(layer, computed)
    if before and all(torch.equal(before[name], value) for name, value in after.items()):
        how = ", ".join(f"{name!r} is computed by {one.kind}" for name, one in computed.items())
        raise InputError(
            f"the layer {path!r} ({type(layer).__name__}) has the same weights after it was initialised"
            f"{f': its {how}' if how else ''}; say how to randomise it with initialise=, or leave it out with "
            "layers=[...]"
        )


def _weights(layer: nn.Module, computed: Mapping[str, ComputedWeight]) -> dict[str, Tensor]:
    """What a layer computes with, without what starts at a constant as biases and scales may."""
    found = {name: value for name, value in layer._parameters.items() if value is not None}
    found = {
        name: value for name, value in found.items() if not any(name in one.originals for one in computed.values())
    }
    found |= {name: one.effective() for name, one in computed.items()}
    return {name: value.detach().clone() for name, value in found.items() if value.ndim > 1}


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """A block whose draws are seeded and leave the global generators as they were."""
    # A network that was built after torch.manual_seed(seed) must not be given its own initial weights.
    seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**63
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
