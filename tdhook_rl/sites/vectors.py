"""A vector of features, one for each row or one for all, in the layout of a module's output."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.sites.inner_calls import batch_at
from tdhook_rl.sites.layouts import CHANNELS_FIRST
from tdhook_rl.sites.rows import feature_dims
from tdhook_rl.sites.runtime import Runtime


def placed_shape(
    vector: torch.Size, value: Tensor, said: int | None, runtime: Runtime, site: str, what: str
) -> torch.Size:
    """The shape in which a vector stands in the place of features, to be broadcast over what is before them.

    A vector of one dimension is for channels where the module has maps, and for the last dimension elsewhere. One of
    several dimensions is for the last of the features, and of agents before the channels of maps; there a size of 1
    holds for the whole dimension.

    Args:
        vector: the shape of the vector.
        value: what the module computed, rows first.
        said: where the module has its features, see :func:`tdhook_rl.sites.layouts.survey_features`.
        runtime: what the hooks share.
        site, what: how messages call the module and the vector.

    Raises:
        InputError: if it does not fit, or if nothing says which dimension it is for.
    """
    batch = batch_at(runtime, site)
    if batch is not None and value.shape == batch + vector:
        return vector  # what it mostly is, found at once
    dims, count = feature_dims(value, batch), len(vector)
    features = value.shape[value.ndim - dims :]
    if vector == features:
        return vector
    shape = vector
    if 0 < count < dims:
        maps = _maps(said, dims, features, count, runtime, site, what)
        if count <= dims - maps and count != maps + 1:
            shape = torch.Size((*vector, *(1,) * maps))
    own = zip(shape, features[dims - len(shape) :], strict=False)
    fits = all(one == other or (one == 1 and (count > 1 or place)) for place, (one, other) in enumerate(own))
    if len(shape) > dims or not fits:
        maps_too = " (for maps: one number for each channel)" if said else ""
        raise InputError(
            f"the {what} for {site!r} has shape {tuple(vector)}, but the module's output has shape "
            f"{tuple(value.shape)}: it has the shape of the features, without the batch{maps_too}"
        )
    return shape


def _maps(said: int | None, dims: int, features: torch.Size, count: int, runtime: Runtime, site: str, what: str) -> int:
    """How many dimensions follow the one that a shorter vector ends at."""
    if said is not None:
        return dims - 1 if said == CHANNELS_FIRST else min(said, dims - 1)
    known = dims if runtime.batch is not None else dims - 1  # else the rows are counted among the features
    possible = [kind for kind in runtime.maps if kind < known]
    if not possible and runtime.maps and 2 <= known and len(set(features[-2:])) == 1:
        possible = [1]  # maps in a row, as many places as channels
    if not possible:
        return 0
    ones = ", 1" * max(possible)
    raise InputError(
        f"the {what} for {site!r} has {count} of the {dims} feature dimensions {tuple(features)}, and nothing says "
        f"which: the module may have maps, with channels first. Give it the shape (n{ones}) for channels or "
        f"({ones[2:]}, n) for the last dimension, or name the convolution before the module"
    )


def unit_axis(value: Tensor, said: int | None, runtime: Runtime, site: str, what: str) -> int:
    """The dimension of units (channels, where the module has maps), counted from the last.

    Args:
        value: what the module computed, rows first.
        said: where the module has its features, see :func:`tdhook_rl.sites.layouts.survey_features`.
        runtime: what the hooks share.
        site, what: how messages call the module and what is done to it.

    Raises:
        InputError: if nothing says which it is.
    """
    dims = feature_dims(value, batch_at(runtime, site))
    if dims <= 1:
        return -1
    return -1 - _maps(said, dims, value.shape[value.ndim - dims :], 1, runtime, site, what)
