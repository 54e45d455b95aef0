"""Subspaces of an activation: along a direction, spanned by the differences of pairs, and at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.sites.numbers import difference
from tdhook_rl.sites.vectors import placed_shape
from tdhook_rl.sweeps.causal.bench import Bench
from tdhook_rl.sweeps.causal.edits import vectors_last

#: A steering vector, a tensor, or one of these for each site.
Direction: TypeAlias = SteeringVector | Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Subspace:
    """A subspace of what a site gives.

    Args:
        basis: orthonormal, ``(vectors, size)``, in float64.
        dims: the dimensions of the activation that its vectors have, from the end.
        odd, of: how many of the differences that it was fitted on are not finite, and were left out, of how many.
    """

    basis: Tensor
    dims: tuple[int, ...]
    odd: int = 0
    of: int = 0

    def said(self, rank: int | None) -> str:
        """Where it was fitted on less, or has not as many dimensions as were asked for, in words."""
        if self.odd and self.odd == self.of:
            return "no difference is finite here"
        said = [f"{self.odd} of {self.of} differences are not finite here, and left out of the fit"] if self.odd else []
        found = len(self.basis)
        if not bool(self.basis.any()):
            said.append("the pairs do not differ here")
        elif rank is not None and found < rank:
            said.append(f"the pairs differ in {found} dimension{'s' * (found > 1)} only")
        return "; ".join(said)

    def random_alike(self, count: int, generator: torch.Generator) -> Tensor:
        """Random subspaces of as many dimensions, ``(count, vectors, size)``."""
        noise = torch.randn(count, self.basis.shape[1], self.basis.shape[0], generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q.transpose(1, 2)


def own_path(vector: SteeringVector) -> str:
    """The module of a steering vector.

    Raises:
        SiteError: for one of an entry that a module writes.
    """
    if not isinstance(vector.path, str):
        raise SiteError(f"direction= is for the entry {vector.path!r}; the outputs of modules are patched: name one")
    return vector.path


def directions_by_site(direction: Direction, sites: Sequence[str]) -> dict[str, Tensor]:
    """The direction at each site.

    Raises:
        SiteError: if one is for another site, or a site has none.
    """
    if isinstance(direction, SteeringVector):
        direction = {own_path(direction): direction}
    if not isinstance(direction, Mapping):
        return {site: numbers(direction, "direction=") for site in sites}
    found = {
        path: one.vector if isinstance(one, SteeringVector) else numbers(one, f"direction= for {path!r}")
        for path, one in direction.items()
    }
    for path in found:
        if path not in sites:
            raise SiteError(f"direction= is for {path!r}, which is not patched; {nearest(path, sites)}")
    lacking = [site for site in sites if site not in found]
    if lacking:
        raise SiteError(f"direction= has none for {lacking[0]!r}; it is for {', '.join(map(repr, found))}")
    return found


def along(direction: Tensor, site: str, activation: Tensor, bench: Bench) -> Subspace:
    """The line along a direction.

    Args:
        direction: of the shape of the features, or of the channels of maps (a component in each place).
        site: where.
        activation: what the site gives, ``(states, ...)``.
        bench: of the policy.

    Raises:
        InputError: if it does not fit, is zero or not finite.
    """
    if not direction.ndim:
        raise InputError(f"the direction at {site!r} has the shape of the site's features, got one number")
    norm = direction.detach().double().norm()
    if not bool(torch.isfinite(norm)) or float(norm) == 0:
        raise InputError(f"the direction at {site!r} must be finite and not zero; its norm is {float(norm)}")
    hooked = bench.hooked
    runtime = hooked._hooked.runtime
    previous, runtime.batch = runtime.batch, activation.shape[:1]
    try:
        module = hooked.hooked_root.get_submodule(bench.paths[site])
        shape = placed_shape(direction.shape, activation, module._hooked_features, runtime, site, "direction")
    finally:
        runtime.batch = previous
    placed = direction.detach().double().cpu().reshape(shape)
    size = activation.shape[activation.ndim - len(shape) :]
    dims = tuple(place - len(shape) for place, (one, own) in enumerate(zip(shape, size, strict=True)) if one == own)
    return Subspace((placed / norm.cpu()).reshape(1, -1), dims)


@dataclass(frozen=True)
class Moments:
    """The outer products of the differences of two activations, summed over those that are finite.

    Args:
        products: ``(units, units)``.
        odd, of: how many differences are not finite, of how many.
    """

    products: Tensor
    odd: int
    of: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.products + other.products, self.odd + other.odd, self.of + other.of)


def of_differences(moments: Moments, rank: int, axis: int) -> Subspace:
    """The subspace that holds most of the differences of pairs: their first principal components, about zero.

    It has fewer dimensions than are asked for where the differences have no more, and one, which is a point, where
    there are none.

    Args:
        moments: of the differences.
        rank: of how many dimensions.
        axis: of the units.
    """
    values, vectors = torch.linalg.eigh(moments.products)
    known = int((values > 1e-10 * values.max().clamp_min(1e-300)).sum())
    basis = vectors.flip(1)[:, : min(rank, known)].T.contiguous()
    if not known:
        basis = torch.zeros(1, len(moments.products), dtype=torch.float64)
    return Subspace(basis, (axis,), moments.odd, moments.of)


def outer_products(clean: Tensor, corrupt: Tensor, axis: int) -> Moments:
    """The outer products of the differences of two activations along the axis of the units."""
    change = difference(clean.detach().double(), corrupt.detach().double()).cpu()
    rows = vectors_last(change, [axis]).flatten(0, -2)
    usable = rows.isfinite().all(-1)
    kept = rows if bool(usable.all()) else rows[usable]
    return Moments(kept.T @ kept, len(rows) - len(kept), len(rows))
