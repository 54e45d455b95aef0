"""The components of sites: units, channels, parts such as heads; and passes in which sets of them are put in.

Every set is one copy of the states in a batched pass: as many sets as one likes cost few passes and no preparation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.sweeps.causal.bench import Bench, Ran
from tdhook_rl.sweeps.causal.edits import PutUnits

Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Components:
    """The components of some sites, in one row.

    Args:
        axes: by site the axis of its units, from the end.
        units: by site how many units it has.
        parts: by site into how many components they are divided, in order and of equal size.
    """

    axes: Mapping[str, int]
    units: Mapping[str, int]
    parts: Mapping[str, int]

    def __len__(self) -> int:
        return sum(self.parts.values())

    @property
    def names(self) -> list[tuple[str, int]]:
        """Site and number of each component."""
        return [(site, number) for site, count in self.parts.items() for number in range(count)]

    @property
    def sites(self) -> list[str]:
        return list(self.parts)

    def cell(self, cells: Mapping[tuple[str, int], Cell], key: Any) -> Cell:
        """What there is of a component, ``(site, number)``.

        Raises:
            InputError: for a component that there is not.
        """
        if key not in cells:
            known = ", ".join(f"{site!r} (0 to {count - 1})" for site, count in self.parts.items())
            raise InputError(f"there is no component {key!r}; there are {known}")
        return cells[key]

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """By site its part of something that is last in ``(..., components)``."""
        return dict(zip(self.parts, row.split(list(self.parts.values()), -1), strict=True))

    def of_units(self, values: Tensor, site: str) -> Tensor:
        """Sums over the units of each component: ``(..., units)`` to ``(..., components)``."""
        if self.parts[site] == self.units[site]:
            return values
        return values.unflatten(-1, (self.parts[site], -1)).sum(-1)

    def in_units(self, chosen: Tensor, site: str) -> Tensor:
        """Components to their units: ``(..., components)`` to ``(..., units)``."""
        return chosen.repeat_interleave(self.units[site] // self.parts[site], -1)

    def single(self, places: Tensor) -> Tensor:
        """Some components, each by itself: ``(places, components)``."""
        sets = torch.zeros(len(places), len(self), dtype=torch.bool)
        sets[torch.arange(len(places)), places] = True
        return sets


def components_of(
    bench: Bench, seen: Ran, states: TensorDictBase, parts: Mapping[str, int] | None = None
) -> Components:
    """Find the components of all sites of a bench.

    Args:
        bench: of the policy.
        seen: a pass in which the activations were kept.
        states: of that pass.
        parts: by site, into how many parts of equal size its units are divided, such as heads; each unit by itself
            unless given.

    Raises:
        SiteError: for a site that is not looked at.
        InputError: for a number that does not divide the units.
    """
    parts = dict(parts or {})
    for site in parts:
        if site not in bench.sites:
            raise SiteError(f"parts= is for {site!r}, which is not looked at; {nearest(site, bench.sites)}")
    axes, units = {}, {}
    for site in bench.sites:
        shown = seen.kept[site][0]
        axes[site] = bench.unit_axis(site, shown, states)
        units[site] = shown.shape[axes[site]]
        count = parts[site] = plain_number(parts.get(site, units[site]))
        if not isinstance(count, int) or count < 1 or units[site] % count:
            raise InputError(f"parts= divides the {units[site]} units of {site!r} into {count!r} parts of equal size")
    return Components(axes, units, {site: parts[site] for site in bench.sites})


def passes(
    bench: Bench,
    states: TensorDictBase,
    components: Components,
    sets: Tensor,
    values: Mapping[str, Sequence[Tensor]],
) -> Iterator[Ran]:
    """Run a policy with sets of components put in, several sets in one pass.

    Args:
        bench: of the policy.
        states: ``(rows,)``.
        components: of its sites.
        sets: boolean, ``(sets, components)``.
        values: by site, of each of its runs, what is put in, ``(rows, ...)``, or one row for all.

    Returns:
        the passes, each over a copy of the states for each of its sets.
    """
    for some in sets.split(max(1, bench.rows_at_once(states) // len(states))):
        changes = {
            site: PutUnits(site, values[site], components.axes[site], components.in_units(chosen, site))
            for site, chosen in components.split(some).items()
            if bool(chosen.any())
        }
        yield bench.run(states, changes, copies=len(some))
