"""Vectors by the place that they act at, and whether those that know where they were found fit there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.latent.vectors.fitting import require_fit
from tdhook_rl.latent.vectors.places import path_and_entry
from tdhook_rl.sites.paths import find_sites


class PlacedVectors(dict[Any, Any]):
    """Tensors, or keys of one for each row, by place.

    Attributes:
        found: by place the steering vectors that some of these are of.
    """

    def __init__(self, given: Mapping[Any, Any]) -> None:
        self.found = {place: one for place, one in given.items() if isinstance(one, SteeringVector)}
        super().__init__(
            {place: one.vector if isinstance(one, SteeringVector) else one for place, one in given.items()}
        )

    def require_fit(self, root: nn.Module) -> None:
        """Check the steering vectors against the module that paths start from; other weights are a warning, once.

        Raises:
            SiteError: if there is no such module, or it writes no such entry.
            InputError: if it has other features, or is another one than that at which the vector was found.
        """
        for place, vector in self.found.items():
            path, entry = path_and_entry(place, "vectors= names")
            require_fit(root, path, entry, vector.vector.shape)
            own = _sites(root, vector.path)
            if place != vector.path and own and own != _sites(root, place):
                raise InputError(
                    f"the vector for {place!r} was found at {vector.path!r}, which the policy has too, and where its "
                    "numbers mean something else: give {vector.path: vector}, or its tensor, vector.vector, if it is "
                    "meant to act elsewhere"
                )
            vector.say_other_weights(root)


def as_vectors(given: Any, what: str) -> PlacedVectors:
    """Vectors by place, from a mapping, of which the values may be steering vectors, or from these alone.

    Raises:
        InputError: for what is none of these, an empty mapping, or two vectors for one module.
    """
    if isinstance(given, SteeringVector):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(one, SteeringVector) for one in given):
        paths = [one.path for one in given]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise InputError(f"{what}= has two vectors for {twice!r}: add them up, or use one method for each")
        given = dict(zip(paths, given, strict=True))
    if not isinstance(given, Mapping) or len(given) == 0:
        raise InputError(f"{what}= is {{path: vector}}, one SteeringVector or a list of them, got {given!r:.80}")
    return PlacedVectors(given)


def _sites(root: nn.Module, place: Any) -> set[tuple[int, Any, Any]]:
    """The modules of a place, by what they are; none where there are none."""
    path, entry = path_and_entry(place, "vectors= names")
    try:
        return {(id(site.module), site.run, entry) for site in find_sites(root, path, runs=True)}
    except SiteError:
        return set()
