"""What gives a layer the weights that training begins with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdhook_rl.internals.torch_names import draw_attention, network_initialiser


def initialiser_of(root: nn.Module, path: str) -> Callable[[], Any] | None:
    """What draws the parameters of one layer anew: its own ``reset_parameters()``, or what the network around it does
    to each of its layers (``_init_weights``, as those of ``transformers`` have); ``None`` where nothing is known.

    Args:
        root: the network.
        path: of the layer in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
        >>> [initialiser_of(net, path) is not None for path in ("", "0", "1")]
        [False, True, True]
    """
    layer = root.get_submodule(path)
    own = getattr(layer, "reset_parameters", None)
    if callable(own):
        return own
    if isinstance(layer, nn.MultiheadAttention):
        return partial(draw_attention, layer)
    while path:
        path = path.rpartition(".")[0]
        around = network_initialiser(root.get_submodule(path))
        if around is not None:
            return partial(around, layer)
    return None


def has_matrices(layer: nn.Module) -> bool:
    """Whether a layer holds more than vectors, such as the logarithm of a scale, or a token."""
    return any(one is not None and is_matrix(one) for one in layer._parameters.values())


def is_matrix(parameter: Tensor) -> bool:
    """Whether it has more than one row."""
    return parameter.shape[:-1].numel() > 1
