"""What the estimators share: reading point clouds from a TensorDict, neighbours, local spectra, writing results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.keys import required
from tdhook_rl.errors import InputError, KeyCollisionError


def check_keys(in_keys: list[NestedKey], out_keys: list[NestedKey]) -> None:
    """Refuse a result key that would replace the data, or another result."""
    for index, key in enumerate(out_keys):
        if key in in_keys or key in out_keys[:index]:
            raise KeyCollisionError(
                f"the result key {key!r} is already used (reads {in_keys}, writes {out_keys}): give another out_key"
            )


def read_points(data: TensorDictBase, key: NestedKey, *, rows: int) -> Tensor:
    """The finite floating-point tensor ``(..., N, D)`` under a key, in single or double precision.

    Each cloud is scaled by a power of two to entries of about 1, which no estimate depends on.

    Raises:
        MissingKeyError: if the key is absent.
        InputError: for another shape or dtype, too few points, NaN or infinite entries.
    """
    points = required(data, key, "the estimator reads")
    if not isinstance(points, Tensor) or not points.is_floating_point():
        found = points.dtype if isinstance(points, Tensor) else type(points).__name__
        if isinstance(points, Tensor) and points.is_complex():
            raise InputError(
                f"{key!r} holds complex numbers ({found}), expected floating-point points (..., N, D): take real and "
                "imaginary parts as features with torch.view_as_real(points).flatten(-2)"
            )
        raise InputError(f"{key!r} holds {found}, expected floating-point points (..., N, D): convert with .float()")
    if points.ndim < 2 or points.shape[-1] < 1 or points.shape[:-2].numel() < 1:
        raise InputError(
            f"{key!r} has shape {tuple(points.shape)}, expected (..., N, D): N points of D >= 1 features; "
            "flatten what is one point, e.g. with .flatten(1)"
        )
    if points.shape[-2] < rows:
        raise InputError(
            f"{key!r} has {points.shape[-2]} points (shape {tuple(points.shape)}), the estimator needs at least {rows}"
        )
    finite = torch.isfinite(points)
    if not bool(finite.all()):
        bad = int((~finite).any(-1).sum())
        raise InputError(f"{bad} points of {key!r} have NaN or infinite entries; drop those rows first")
    points = points if points.dtype in (torch.float32, torch.float64) else points.float()
    # Squares of entries beyond 1e19 or below 1e-19 leave the range of float32; a power of two rounds nothing.
    exponent = torch.frexp(points.detach().abs().amax((-2, -1), keepdim=True)).exponent
    # Not ldexp(points, ...): with an integer exponent its gradient is rounded to an integer (torch 2.13).
    most = 120 if points.dtype == torch.float32 else 1020
    return points * torch.ldexp(torch.ones_like(exponent, dtype=points.dtype), -exponent.clamp(-most, most))


def write_results(data: TensorDictBase, results: Mapping[NestedKey, Tensor]) -> TensorDictBase:
    """Set the results; a locked TensorDict stays as it is and a shallow copy takes them.

    Raises:
        InputError: if the batch size counts the points of one cloud, so that a result per cloud does not fit.
    """
    for key, value in results.items():
        if value.shape[: data.batch_dims] != data.batch_size:
            raise InputError(
                f"the result {key!r} has shape {tuple(value.shape)}, which does not fit the TensorDict's batch size "
                f"{tuple(data.batch_size)}: the points of a cloud are no batch dimension here; "
                f"pass TensorDict({{...}}, batch_size={list(value.shape[: max(data.batch_dims - 1, 0)])})"
            )
    if data.is_locked:
        data = data.copy()
    for key, value in results.items():
        data.set(key, value)
    return data


def distances(points: Tensor, p: float = 2.0) -> Tensor:
    """Distances ``(..., N, N)`` between the points of each cloud; infinite from a point to itself."""
    # The faster expansion |x|^2 - 2xy + |y|^2 cancels: near neighbours come out wrong, duplicates not at zero.
    found = torch.cdist(points, points, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(points.shape[-2], dtype=torch.bool, device=points.device)
    return found.masked_fill(itself, math.inf)


def nearest_neighbours(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices, both ``(..., N, k)``, of the k nearest other points, nearest first."""
    found = distances(points).topk(k, dim=-1, largest=False, sorted=True)
    return found.values, found.indices


def refuse_duplicates(smallest: Tensor, key: NestedKey, *, tolerance: Tensor | float = 0.0, what: str) -> None:
    """Raise if a distance ``(..., N)`` that the estimator divides by is zero."""
    bad = int((smallest <= tolerance).sum())
    if bad:
        raise InputError(
            f"{bad} of {smallest.numel()} points of {key!r} coincide with {what}, so that a distance is zero and the "
            "dimension is undefined; drop duplicates (torch.unique(points, dim=-2)) or repeated steps first"
        )


#: Of points that are copies of others but for rounding: how much further than the last copy the next point is, at
#: least. Of points of one dimension, of which pairs are apart most easily, it is a thousandth of them.
APART = 1000.0
#: Among so many neighbours copies are looked for, and in so large a share of the points.
COPIES, COPIED = 10, 0.1


def refuse_copies(near: Tensor, key: NestedKey) -> None:
    """Raise if many points of a cloud have a few neighbours, and all others far away from these.

    Their distances are those of the noise by which they differ, whatever the dimension of the cloud.

    Args:
        near: distances to the nearest points, ``(..., N, k)``, nearest first.
        key: where the points are.
    """
    rows, near = near.shape[-2], near[..., :COPIES]
    copied = (near[..., 1:] > APART * near[..., :-1]).any(-1).sum(-1)
    if bool((copied > max(5, COPIED * rows)).any()):
        raise InputError(
            f"{int(copied.max())} of {rows} points of {key!r} are near-duplicates of others: all but these are more "
            f"than {APART:g} times as far away, so that the ratios of distances are those of what they differ by. Drop "
            "near-duplicates first, or use LocalPcaDimensionEstimator with more neighbours than a point has copies"
        )


def check_k(k: int | Literal["auto"], *, least: int) -> None:
    """Refuse a number of neighbours that no cloud can satisfy."""
    if k == "auto":
        return
    if isinstance(k, bool) or not isinstance(k, int) or k < least:
        raise InputError(f"k is 'auto' or an integer of at least {least}, got {k!r}")


def resolve_k(k: int | Literal["auto"], points: Tensor, key: NestedKey, *, least: int, reserve: int) -> int:
    """The number of neighbours: as asked, or the square root of N for ``"auto"``, which grows slower than N."""
    rows = points.shape[-2]
    most = rows - reserve
    if k == "auto":
        return min(max(least, round(math.sqrt(rows))), most)
    if k > most:
        raise InputError(f"k={k} neighbours were asked for, but {key!r} has {rows} points: k is at most {most}")
    return k


def local_spectrum(points: Tensor, index: Tensor, *, with_itself: bool) -> Tensor:
    """Eigenvalues, largest first, of the covariance of each point's neighbourhood.

    Args:
        points: ``(..., N, D)``.
        index: ``(..., N, k)``, the neighbours.
        with_itself: whether the point belongs to its neighbourhood.

    Returns:
        ``(..., N, min(M - 1, D))`` for M points in a neighbourhood: the others are zero, whatever the data.
    """
    rows, width = points.shape[-2:]
    if with_itself:
        itself = torch.arange(rows, device=index.device)[:, None].expand(*index.shape[:-1], 1)
        index = torch.cat([itself, index], dim=-1)
    clouds = points.reshape(-1, rows, width)
    members = index.shape[-1]
    which = torch.arange(len(clouds), device=index.device)[:, None, None]
    local = clouds[which, index.reshape(-1, rows, members)].reshape(*points.shape[:-1], members, width)
    local = local - local.mean(-2, keepdim=True)
    return torch.linalg.svdvals(local)[..., : members - 1].square() / (members - 1)
