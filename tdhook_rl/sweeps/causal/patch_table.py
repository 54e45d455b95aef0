"""How much of the difference of two runs a patch brings over, by state, with intervals and beside random directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.statistics import Interval, bootstrap, grouped_mean
from tdhook_rl.statistics.cells import Cells, only, shown, words_of
from tdhook_rl.statistics.interval import none
from tdhook_rl.sweeps.causal.gap import Gap, pooled_shares


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchCell:
    """One patch.

    Args:
        site: the path of the module; ``"sender -> receiver"`` of a path.
        patch: what was put in: ``"all"``, ``"direction"``, ``"rank 2"``, ``"path"``.
        median: the median share over groups of states: 0 nothing changes, 1 it is as in the run that the activation is
            from.
        mean: the mean share over states.
        size: the median over groups of states of the size of the share, whatever its sign, which random directions are
            compared by.
        size_interval: the same with its limits; ``None`` where no state is left.
        random: that of random directions (subspaces) of equal dimension, its mean over them; ``None`` without.
        p: the share of random directions that do as much, the direction counted as one.
        pooled: all of the change over all of the difference: the mean share, weighted by the size of the difference.
        pooled_interval: the same with its limits; ``None`` where no state is left.
        shares: ``(states,)``, the share in each state that was given; NaN where it was left out.
        at_random: ``(controls, states)``, the same for random directions.
        left_out: states without a share.
        words: why, and what else one has to know.
        checkpoint: the name of the weights, where there are several.
    """

    site: str
    patch: str
    median: Interval
    mean: Interval
    size: float
    pooled: float
    size_interval: Interval | None = None
    pooled_interval: Interval | None = None
    random: Interval | None = None
    p: float = math.nan
    shares: Tensor = field(repr=False)
    at_random: Tensor | None = field(default=None, repr=False)
    left_out: int = 0
    words: str = ""
    checkpoint: str = ""

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words; intervals with their limits."""
        found: dict[str, Any] = {"checkpoint": self.checkpoint} if self.checkpoint else {}
        found |= {"site": self.site, "patch": self.patch}
        for name in ("median", "mean", "random"):
            one = getattr(self, name)
            if one is not None:
                found |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
        for name in ("size", "pooled"):
            one = getattr(self, f"{name}_interval")
            ends = (math.nan, math.nan) if one is None else (one.low, one.high)
            found |= {name: getattr(self, name), f"{name}_low": ends[0], f"{name}_high": ends[1]}
        found |= {"p": self.p, "left_out": self.left_out}
        return found | {"groups": self.mean.groups, "states": int(self.mean.rows), "words": words_of(self)}


class PatchTable(Cells[PatchCell]):
    """Patches, one in each row.

    Args:
        cells: the rows.
        way: ``"denoising"`` or ``"noising"``.
        metric: what shares are of, in words.

    Attributes:
        way, metric: as given.
    """

    def __init__(self, cells: Sequence[PatchCell], way: str, metric: str) -> None:
        super().__init__(cells)
        self.way = way
        self.metric = metric

    def __getitem__(self, key: Any) -> Any:
        """The cell of a site, of ``(site, patch)``, of ``(checkpoint, site, patch)``; or cells by number.

        Raises:
            InputError: for one that is not in the table, or of which there are several.
        """
        key = plain_number(key)
        if isinstance(key, (int, slice)):
            return super().__getitem__(key)
        asked = key if isinstance(key, tuple) else (key,)
        names = [(cell.checkpoint, cell.site, cell.patch) for cell in self]
        places = [place for place, one in enumerate(names) if asked in (one, one[1:], one[1:2])]
        found = only([self._cells[place] for place in places], key, [names[place] for place in places])
        if found is not None:
            return found
        known = [cell.site for cell in self]
        raise InputError(f"the table has no patch {key!r}; {nearest(', '.join(map(str, asked)), known)}")

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown."""
        several, controlled = any(cell.checkpoint for cell in self), any(cell.random is not None for cell in self)
        heads = ["checkpoint"] * several + ["site", "patch", "median share", "mean share"]
        heads += ["size", "random directions", "p"] * controlled + ["groups", "left out", "words"]
        rows = []
        for cell in self:
            row = [cell.checkpoint] * several + [cell.site, cell.patch, shown(cell.median), shown(cell.mean)]
            if controlled:
                size = _number(cell.size) if cell.size_interval is None else shown(cell.size_interval)
                row += [size, shown(cell.random), _number(cell.p)]
            rows.append([*row, str(cell.mean.groups), str(cell.left_out), cell.words])
        return heads, rows

    def __str__(self) -> str:
        how = {
            "denoising": "runs on corrupt states with activations of the clean ones put in",
            "noising": "runs on clean states with activations of the corrupt ones put in",
        }[self.way]
        return f"{self.way}: {how}; share of: {self.metric}\n{super().__str__()}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def summed_up(
    site: str,
    patch: str,
    gap: Gap,
    reached: Tensor,
    groups: Tensor | None,
    *,
    among: Any = None,
    at_random: Tensor | None = None,
    checkpoint: str = "",
    words: str = "",
) -> PatchCell:
    """The row of a patch.

    Args:
        site, patch: what was put in where.
        gap: what there is to be brought over.
        reached: ``(states,)``, the metric of the patched run.
        groups: of the states.
        among: gives the values of these states among all that were given.
        at_random: ``(controls, states)``, the metric with random directions.
        checkpoint: the name of the weights.
        words: what else is to be said.
    """
    shares = gap.shares(reached)
    usable = torch.isfinite(shares)
    kept, own = shares[usable], None if groups is None else groups[usable]
    said = [words, gap.left_out(reached)]
    random, sized, whole, p, others = None, None, None, math.nan, None
    if not len(kept):
        said.append("no state is left")
        shape = {"confidence": 0.95, "groups": 0, "rows": 0}
        median = mean = none(math.nan, "no state is left", **shape)
        size = math.nan
    else:
        median, mean = bootstrap(np.median, kept, own), grouped_mean(kept, own)
        sized = bootstrap(np.median, kept.abs(), own)
        size = sized.estimate
        left = Gap(gap.base[usable], gap.source[usable], gap.dtype)
        (whole,) = pooled_shares((reached - gap.base)[usable][None], left, own)
        said += [one.words for one in (mean, median) if not one.known]
    if at_random is not None:
        others = gap.shares(at_random)
        sizes = _sizes(others[:, usable], own) if len(kept) else np.array([math.nan])
        if np.isfinite(sizes).all():
            random = grouped_mean(sizes)
            p = (1 + int((sizes >= size).sum())) / (1 + len(sizes))
    among = (lambda values: values) if among is None else among
    everywhere = among(shares)
    return PatchCell(
        site=site, patch=patch, median=median, mean=mean, size=size, size_interval=sized,
        pooled=float(gap.pooled(reached)), pooled_interval=whole, random=random, p=p, shares=everywhere,
        at_random=None if others is None else among(others),
        left_out=int((~torch.isfinite(everywhere)).sum()), words="; ".join(dict.fromkeys(one for one in said if one)),
        checkpoint=checkpoint,
    )  # fmt: skip


def _sizes(shares: Tensor, groups: Tensor | None) -> np.ndarray:
    """Of each row of shares, ``(controls, states)``, the median over groups of their mean size; NaN is left out."""
    sizes = shares.abs()
    if groups is not None:
        numbers = torch.unique(groups, return_inverse=True)[1]
        sums, known = (
            sizes.new_zeros(len(sizes), int(numbers.max()) + 1).index_add_(1, numbers, one)
            for one in (sizes.masked_fill(sizes.isnan(), 0.0), (~sizes.isnan()).to(sizes))
        )
        sizes = sums / known
    return np.nanmedian(sizes.numpy(), -1)
