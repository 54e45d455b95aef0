"""Which features are replaced together: every one by itself, disjoint or overlapping groups, or masks of each row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked, shown
from tdhook_rl.arguments.tensors import numbers, plain_number
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.batching import row_vectors


class Disjoint:
    """Groups without a feature in common; ``owner`` has the group of each feature, or -1."""

    def __init__(self, owner: Tensor, count: int) -> None:
        self.owner = owner  # of the shape of the features
        self.count = count

    def mask(self, start: int, stop: int, value: Tensor) -> Tensor:
        """Which entries the groups ``start`` to ``stop`` replace, ``(groups, ...)`` against the value."""
        group = torch.arange(start, stop, device=value.device).reshape(-1, *(1,) * value.ndim)
        return self.owner.to(value.device) == group

    def spread(self, scores: Tensor) -> Tensor:
        """From a score for each group, ``(count, *batch)``, to one for each entry, batch + features."""
        by_group = torch.cat([scores, torch.zeros_like(scores[:1])]).movedim(0, -1)  # -1 finds the zero
        return by_group[..., self.owner.to(scores.device)]


class _ByRow(Disjoint):
    """Groups of each row; ``owner`` has the shape of batch and features."""

    def spread(self, scores: Tensor) -> Tensor:
        by_group = torch.cat([scores, torch.zeros(1, *scores.shape[1:], dtype=scores.dtype, device=scores.device)])
        owner = self.owner.to(scores.device)
        index = row_vectors(torch.where(owner < 0, self.count, owner), scores.shape[1:])
        return by_group.movedim(0, -1).gather(-1, index).reshape(owner.shape)


class Overlapping:
    """Groups that share features: a feature's score is the mean over the groups that it is in."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks  # (groups, *features)
        self.count = len(masks)

    def mask(self, start: int, stop: int, value: Tensor) -> Tensor:
        masks = self.masks[start:stop].to(value.device)
        return masks.reshape(len(masks), *(1,) * (value.ndim - masks.ndim + 1), *masks.shape[1:])

    def spread(self, scores: Tensor) -> Tensor:
        masks = self.masks.to(scores.device)
        features = (1,) * (masks.ndim - 1)
        total = torch.zeros(*scores.shape[1:], *masks.shape[1:], dtype=scores.dtype, device=scores.device)
        for mask, score in zip(masks, scores, strict=True):
            # where, not a product: a group that is NaN says nothing of the features outside it.
            total = torch.where(mask, total + score.reshape((*score.shape, *features)), total)
        return total / masks.sum(0).clamp_min(1)


Groups = Disjoint | Overlapping


def each_feature(shape: torch.Size) -> Disjoint:
    """Every feature by itself."""
    return Disjoint(torch.arange(shape.numel()).reshape(shape), shape.numel())


def group_features(groups: Any, shape: torch.Size, key: NestedKey) -> Groups:
    """Groups as the user lists them: indices into the flattened features, or boolean masks of their shape.

    Raises:
        InputError: for an empty group, an index out of range, or what is neither indices nor a mask.
    """
    if isinstance(groups, Tensor):
        groups = numbers(groups, f"groups= of {key!r}", imaginary=True)
    try:
        listed = list(groups)
    except TypeError:
        listed = None
    if listed is None or isinstance(groups, (str, bytes)):
        raise InputError(
            f"groups= of {key!r} is a list of groups, each a list of indices or a mask; got {shown(groups)}"
        )
    if not listed:
        raise InputError(f"groups= of {key!r} is empty: leave it out for every feature by itself")
    features = shape.numel()
    members = [_members(group, number, shape, key) for number, group in enumerate(listed)]
    owner = torch.full((features,), -1)
    for number, chosen in enumerate(members):
        owner[chosen] = number
    if sum(map(len, members)) == int((owner != -1).sum()):
        return Disjoint(owner.reshape(shape), len(members))
    masks = torch.zeros(len(members), features, dtype=torch.bool)
    for mask, chosen in zip(masks, members, strict=True):
        mask[chosen] = True
    return Overlapping(masks.reshape(len(members), *shape))


def _members(group: Any, number: int, shape: torch.Size, key: NestedKey) -> Tensor:
    found = numbers(group, f"group {number} of {key!r}", imaginary=True)
    features = shape.numel()
    if found is not None and found.dtype == torch.bool:
        if found.shape not in (shape, (features,)):
            raise InputError(
                f"group {number} of {key!r} is a mask of shape {tuple(found.shape)}, but the input has features of "
                f"shape {tuple(shape)}; masks that differ between rows are read from the data: groups='key'"
            )
        found = found.reshape(-1).nonzero().squeeze(-1)
    if not found.ndim or (found.is_floating_point() and found.numel()) or found.is_complex():
        raise InputError(f"group {number} of {key!r} is a list of indices or a boolean mask, got {shown(group)}")
    indices = found.reshape(-1).long().cpu().unique()
    if not len(indices):
        raise InputError(f"group {number} of {key!r} is empty")
    for index in (int(indices[0]), int(indices[-1])):
        if not 0 <= index < features:
            raise InputError(
                f"group {number} of {key!r} has index {index}, but the input has {features} features: "
                f"0 to {features - 1}, counted in the flattened input"
            )
    return indices


def groups_of_rows(found: Tensor, value: Tensor, key: NestedKey, name: NestedKey) -> Disjoint:
    """Groups that the data holds for each row: the number of the group of each feature, or -1; or one boolean mask.

    Raises:
        InputError: for what does not broadcast to the shape of the input, or numbers that are no integers.
    """
    try:
        fits = found.ndim == value.ndim and torch.broadcast_shapes(found.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits or found.is_floating_point() or found.is_complex():
        raise InputError(
            f"groups={name!r} holds {found.dtype} of shape {tuple(found.shape)}: for the input {key!r} it takes the "
            f"number of the group of each feature (-1 for none), or a boolean mask, of shape {tuple(value.shape)}"
        )
    owner = found.long() - 1 if found.dtype == torch.bool else found.long()
    owner = owner.expand(value.shape)
    return _ByRow(owner, int(owner.max()) + 1 if owner.numel() else 0)


@checked
def windows(shape: Sequence[int], size: Sequence[int], stride: Sequence[int] | None = None) -> list[list[int]]:
    """Groups of the features in a window that slides over them; they overlap where the stride is below the size.

    Args:
        shape: of the features, such as ``(channels, rows, columns)``.
        size: of the window, one number for each dimension.
        stride: how far it moves; as far as it is wide by default. The last window of a dimension ends at the edge.

    Raises:
        InputError: for numbers that are not positive, or of another count.

    Example:
        >>> windows([6], [3], [2])
        [[0, 1, 2], [2, 3, 4], [3, 4, 5]]
    """
    stride = size if stride is None else stride
    shape, size, stride = ([plain_number(one) for one in given] for given in (shape, size, stride))
    if not len(shape) == len(size) == len(stride) or any(
        not isinstance(n, int) or n < 1 for n in (*shape, *size, *stride)
    ):
        raise InputError(f"windows() takes positive integers for each dimension, got {shape}, {size} and {stride}")
    if any(one > length for one, length in zip(size, shape, strict=True)):
        raise InputError(f"a window of {tuple(size)} does not fit features of shape {tuple(shape)}")
    places = torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))
    starts = [
        [*range(0, length - one, step), length - one] for length, one, step in zip(shape, size, stride, strict=True)
    ]
    return [
        places[tuple(slice(a, a + one) for a, one in zip(corner, size, strict=True))].reshape(-1).tolist()
        for corner in product(*starts)
    ]
