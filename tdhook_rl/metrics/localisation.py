"""Localisation: does the relevance lie on the features that are known to matter?

For policies whose truth is known, as in :mod:`tdhook_rl.envs`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.metrics.scoring import wide

Sign = Literal["absolute", "positive"]


@checked
def relevance_mass(
    attribution: Tensor, mask: Tensor, *, sign: Sign = "absolute", feature_dims: int | None = None
) -> Tensor:
    """The share of the relevance that lies on the relevant features (Arras, Osman & Samek 2022, Information Fusion).

    Args:
        attribution: ``(*batch, *features)``.
        mask: boolean, true where a feature is relevant: ``features``, or of each row ``(*batch, *features)``.
        sign: what counts as relevance, the absolute value or the positive part.
        feature_dims: how many trailing dimensions are features; by default those of the mask.

    Returns:
        a share in [0, 1] (higher is better; chance is the share of relevant features), the batch shape; NaN
        for rows without any relevance.

    Raises:
        InputError: for a mask that is not boolean, of another shape, or without a relevant feature.

    Example:
        >>> relevance_mass(torch.tensor([[3.0, -1.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([True, False, False]))
        tensor([0.7500, 0.0000])
    """
    values, relevant = _rows(attribution, mask, feature_dims, sign)
    return values.where(relevant, 0).sum(-1) / values.sum(-1)


@checked
def pointing_game(
    attribution: Tensor, mask: Tensor, *, sign: Sign = "absolute", feature_dims: int | None = None
) -> Tensor:
    """Whether the most relevant feature is one of the relevant ones (Zhang et al. 2018, IJCV), without tolerance.

    Args:
        attribution: ``(*batch, *features)``.
        mask: boolean, true where a feature is relevant: ``features``, or of each row ``(*batch, *features)``.
        sign: what counts as relevance, the absolute value or the positive part.
        feature_dims: how many trailing dimensions are features; by default those of the mask.

    Returns:
        1 for a hit and 0 for a miss, the batch shape; its mean is the accuracy (higher is better). Where several
        features share the maximum all must be relevant, so an attribution that is constant misses. NaN for rows
        whose attribution has a NaN, as those that were not explained have: ``nanmean()`` leaves them out.

    Raises:
        InputError: for a mask that is not boolean, of another shape, or without a relevant feature.

    Example:
        >>> pointing_game(torch.tensor([[3.0, -1.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([True, False, False]))
        tensor([1., 0.])
    """
    values, relevant = _rows(attribution, mask, feature_dims, sign)
    top = values == values.amax(-1, keepdim=True)
    hit = (top.any(-1) & ~(top & ~relevant).any(-1)).to(values.dtype)
    return hit.masked_fill(values.isnan().any(-1), torch.nan)


def _rows(attribution: Tensor, mask: Tensor, feature_dims: int | None, sign: Sign) -> tuple[Tensor, Tensor]:
    """Relevance and mask as ``(*batch, features)``."""
    if sign not in get_args(Sign):
        raise InputError(f"sign= is 'absolute' or 'positive', got {sign!r}")
    if mask.dtype != torch.bool:
        raise InputError(f"a mask is boolean, true where a feature is relevant; got {mask.dtype}: use mask.bool()")
    dims = mask.ndim if feature_dims is None else feature_dims
    if not 1 <= dims <= attribution.ndim:
        raise InputError(
            f"{dims} feature dimensions were asked of an attribution of shape {tuple(attribution.shape)}: there are 1 "
            f"to {attribution.ndim}"
        )
    batch, features = attribution.shape[: attribution.ndim - dims], attribution.shape[attribution.ndim - dims :]
    if mask.shape not in (features, attribution.shape):
        raise InputError(
            f"the mask has shape {tuple(mask.shape)}; it must have the features of the attribution, "
            f"{tuple(features)}, or its whole shape, {tuple(attribution.shape)} (then with feature_dims=)"
        )
    if attribution.numel() == 0:
        raise InputError(f"there is nothing to score: the attribution has shape {tuple(attribution.shape)}")
    relevant = mask.expand(attribution.shape).reshape(*batch, -1)
    if not bool(relevant.any(-1).all()):
        raise InputError("the mask marks no feature as relevant, in one row at least: leave such rows out")
    values = wide(attribution.detach())
    values = values.abs() if sign == "absolute" else values.clamp_min(0)
    return values.reshape(*batch, -1), relevant
