"""The network before it was trained: the same modules with weights drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tdhook_rl.weights.initial import has_matrices, initialiser_of, is_matrix


@checked
def untrained_copy(module: nn.Module, *, seed: int = 0) -> Any:
    """A copy of a policy or network whose layers are initialised anew.

    What an untrained network of the same shape lets one read is what a probe of the trained one is held against: much
    of what can be read was never learnt. The module is not touched, and the global generators are as before.

    A layer is initialised by its ``reset_parameters()``; attention as torch makes it; another by what the network
    around it does to each of its layers, ``_init_weights(layer)``, as those of ``transformers`` do. Vectors of a module
    without any of these (the ``log_std`` of a normal policy, a token) stay as they are.

    Args:
        module: a policy or network, not hooked.
        seed: of the new weights.

    Raises:
        InputError: for modules with weights that nothing initialises, by name.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> other = untrained_copy(net)
        >>> other[0].weight.shape == net[0].weight.shape, torch.equal(other[0].weight, net[0].weight)
        (True, False)
    """
    own = whole_copy(module, "untrained_copy initialises")
    layers = dict(_owner(own, path, layer) for path, layer in own.named_modules() if has_parameters(path, layer))
    drawing = {path: initialiser_of(own, path) for path in layers}
    unknown = [path for path in layers if drawing[path] is None and is_drawn(own, path)]
    _require_known(module, layers, unknown)
    with own_generators(seed):
        for path, layer in sorted(layers.items(), key=lambda one: not _resets(one[1])):  # what is around layers last
            draw = drawing[path]
            if draw is not None and not _drawn(path, layer, draw):
                unknown.append(path)
    _require_known(module, layers, unknown)
    return own


def _resets(layer: nn.Module) -> bool:
    return callable(getattr(layer, "reset_parameters", None))


def _require_known(module: nn.Module, layers: Mapping[str, nn.Module], unknown: Sequence[str]) -> None:
    if unknown:
        named = [f"{path or '(root)'} ({type(layers[path]).__name__})" for path in unknown]
        raise InputError(
            f"no untrained copy of {type(module).__name__}: {listed(named, 5)} has weights and no "
            "reset_parameters(); give the untrained network yourself, untrained=copy.deepcopy(policy) before training"
        )


def _drawn(path: str, layer: nn.Module, draw: Callable[[], Any]) -> bool:
    """Draw a layer anew; whether it has, where that is not up to a method of its own."""
    computed = computed_weights(layer)
    if computed and _resets(layer):
        draw_anew(path, layer, computed)
        return True
    before = {} if _resets(layer) else _weights(layer, computed)
    with torch.no_grad():
        draw()
    after = _weights(layer, computed)
    return not any(is_matrix(value) and torch.equal(value, after[name]) for name, value in before.items())


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


def is_drawn(root: nn.Module, path: str) -> bool:
    """Whether a layer is more than a vector that nothing initialises."""
    layer = root.get_submodule(path)
    return has_matrices(layer) or is_parametrized(layer) or initialiser_of(root, path) is not None


def initialise_layer(root: nn.Module, path: str, initialise: Callable[[nn.Module], Any] | None) -> None:
    """Initialise one layer, as :func:`untrained_copy` does unless told otherwise.

    Raises:
        InputError: if it cannot be, or has the same weights afterwards.
    """
    layer = root.get_submodule(path)
    computed = computed_weights(layer)
    before = _weights(layer, computed)
    if initialise is not None:
        initialise(layer)
    else:
        draw = initialiser_of(root, path)
        if draw is None:
            raise InputError(
                f"the layer {path!r} ({type(layer).__name__}) has no reset_parameters(): say how to randomise it with "
                "initialise=, or leave it out with layers=[...]"
            )
        _drawn(path, layer, draw)
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
