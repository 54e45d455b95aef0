"""What modules say about the dimensions of their outputs: which is the batch, and which are features.

A recurrent or attention module says whether time or the batch comes first (``batch_first``), a convolution that
channels come before its maps, a linear layer that features come last. An activation says nothing by itself; in an
``nn.Sequential`` it has the layout of what is before it.
"""

from __future__ import annotations

import re
from functools import cache

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import ConvNd
from tdhook_rl.sites.listed import modules

#: Of a module of which the first feature dimension has the channels, however many follow.
CHANNELS_FIRST = -1

_TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
)  # fmt: skip
_FEATURES_LAST = (
    nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase,
    nn.MultiheadAttention, *_TRANSFORMERS,
)  # fmt: skip
_CHANNELS_FIRST = (
    nn.GroupNorm, nn.SyncBatchNorm, nn.LocalResponseNorm, nn.ChannelShuffle, nn.Upsample, nn.Unfold
)  # fmt: skip
_TWO_DIMENSIONAL = (nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold)
# Work on each number by itself, or along a dimension that they keep.
_KEEPS = tuple(
    one
    for one in vars(nn.modules.activation).values()
    if isinstance(one, type)
    and issubclass(one, nn.Module)
    and one is not nn.Module
    and not issubclass(one, (nn.MultiheadAttention, nn.Linear, nn.GLU))
) + (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


def takes_time_first(module: nn.Module, inside: bool) -> bool:
    """Whether a module has time first and the batch second; ``inside`` is what holds for a transformer around it."""
    if isinstance(module, TensorDictModuleBase):
        return False
    said = getattr(module, "batch_first", None)
    if said is None and isinstance(module, _TRANSFORMERS):
        layers = getattr(module, "layers", None)
        layer = layers[0] if isinstance(layers, nn.ModuleList) and len(layers) else module
        said = getattr(getattr(layer, "self_attn", None), "batch_first", None)
    return inside if said is None else said is False


def is_transformer(module: nn.Module) -> bool:
    """Whether the modules inside have its layout."""
    return isinstance(module, _TRANSFORMERS)


def time_comes_first(value: Tensor, batch: torch.Size | None, site: str, exact: bool) -> bool:
    """Whether a tensor of a module that takes time first has the rows of the call in its second dimension.

    Raises:
        InputError: if both dimensions may be meant, and it matters (``exact``).
    """
    if value.ndim < 3 or batch == ():
        return False
    if batch is None:
        return True
    steps, rows = value.shape[:2]
    if len(batch) == 1:
        return not (rows == 1 and steps == batch[0])  # one trajectory, whose steps are the rows of the call
    as_they_are = value.shape[: len(batch)] == batch
    if exact and len(batch) == 2 and as_they_are and steps == rows > 1:
        raise InputError(
            f"{site!r} takes time first (batch_first=False) and gives {tuple(value.shape)} for a batch of "
            f"{tuple(batch)}: either dimension may be time, and nothing says which. Use batch_first=True, or a batch "
            "with another number of steps than of trajectories"
        )
    return not as_they_are or steps == rows


def survey_features(policy: nn.Module) -> frozenset[int]:
    """Tell each module of a clone where its features are; returns how many dimensions the policy's maps have.

    ``_hooked_features`` is the number of dimensions that follow the channels (0: features come last, 2: maps of rows
    and columns), :data:`CHANNELS_FIRST`, or ``None`` where nothing says it.
    """
    found: dict[int, int | None] = {}
    kinds = set()
    for module in modules(policy):
        if isinstance(module, nn.Sequential):
            _follow(module, found)
        said = _says(module)
        if isinstance(module, ConvNd) and said:
            kinds.add(said)
    for module in modules(policy):
        if not isinstance(module, TensorDictParams):  # the original holds the same object, and it never runs
            module.__dict__["_hooked_features"] = _stated(module, found)
    return frozenset(kinds)


def _follow(chain: nn.Sequential, found: dict[int, int | None]) -> int | None:
    """The layout that goes through a chain; notes that of each module that says nothing by itself."""
    before: int | None = None
    for child in chain.children():
        if isinstance(child, _KEEPS) or _is_over_several(child):
            before = before if found.setdefault(id(child), before) == before else None
            found[id(child)] = before
        elif isinstance(child, nn.Sequential):
            before = _follow(child, found)
        elif isinstance(child, nn.Flatten) and before and child.start_dim >= 2:  # of maps, whose channels stay
            before = found[id(child)] = CHANNELS_FIRST
        else:
            before = _says(child)
    return before


def _stated(module: nn.Module, found: dict[int, int | None]) -> int | None:
    if isinstance(module, nn.Sequential):
        return _follow(module, found)
    if type(module) is TensorDictModule:
        return _stated(module.module, found) if isinstance(module.module, nn.Module) else None
    said = _says(module)
    return found.get(id(module)) if said is None else said


def _is_over_several(module: nn.Module) -> bool:
    """Whether a norm is over several dimensions, maps say, which it keeps as they are."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) > 1


def _says(module: nn.Module) -> int | None:
    if _is_over_several(module):
        return None
    if isinstance(module, _FEATURES_LAST):
        return 0
    if isinstance(module, _CHANNELS_FIRST) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
        return CHANNELS_FIRST
    if isinstance(module, _TWO_DIMENSIONAL):
        return 2
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.") and (number := _number_in(base.__name__)):
            return number
    return None


@cache
def _number_in(name: str) -> int | None:
    """Of how many dimensions maps are, by the name of their class."""
    match = re.search(r"([123])d$", name)
    return None if match is None else int(match[1])
