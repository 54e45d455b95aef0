"""Sums of several sources at once, such as the layers of a network: the same rows with the same labels.

What differs is the features. Everything else, and every small operation of a fit, is done once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.moments import BLOCK, Moments, spread_of

#: Numbers in the matrices that are factorised at once.
_AT_ONCE = 2**22


class StackedMoments(Moments):
    """The base of banks of probes: second moments for each source and each half of the rows.

    Args:
        sources: how many there are.
        features: the length of a feature vector, of all of them.

    Attributes:
        shift: ``(sources, features)``, the means of the first rows; everything is kept about them, in float64.
        moment: ``(sources, 2, features, features)``, the sum of ``(x - shift) (x - shift)^T`` of each half.
    """

    @torch.inference_mode(False)
    def __init__(self, *, sources: int, features: int) -> None:
        if sources < 1:
            raise InputError(f"a bank reads at least 1 source, got {sources}")
        super().__init__(features=features, sources=(sources,), parts=(2,))

    def _start(self, features: Sequence[Tensor], halves: Sequence[Tensor], usable: Tensor | None) -> bool:
        """Note how fine these rows are, and take the shifts of the first ones; whether these are."""
        for rows in features:
            if rows.is_floating_point():
                self.resolution = max(self.resolution, torch.finfo(rows.dtype).eps)
        if self._begun:
            return False
        self._begun = True
        first = torch.cat(list(halves))[:BLOCK]
        for source, rows in enumerate(features):
            own = first if usable is None else first[usable[source, first]]
            if len(own):
                self.shift[source] = rows[own].double().mean(0)
        return True

    def _halves(
        self, features: Sequence[Tensor], halves: Sequence[Tensor], usable: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Iterator[tuple[int, Tensor, Tensor | None]]]]:
        """A block of rows at a time: its half, the numbers of its rows, and for each source what it holds.

        That is the number of the source, its rows about the shift in float64 (those that are not usable are zero) and
        which are usable, if not all. The second moments are added up here.
        """
        most = min(max(map(len, halves)), BLOCK)
        memory = torch.empty(most, self.width, dtype=torch.float64)
        for half, numbers in enumerate(halves):
            every = len(numbers) == len(features[0])
            for start in range(0, len(numbers), BLOCK):
                part = numbers[start : start + BLOCK]
                own = slice(start, start + len(part)) if every else part
                yield half, part, self._sources(features, half, own, usable, memory[: len(part)])

    def _sources(
        self, features: Sequence[Tensor], half: int, part: slice | Tensor, usable: Tensor | None, block: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for source, rows in enumerate(features):
            block.copy_(rows[part] if isinstance(part, slice) else rows.index_select(0, part)).sub_(self.shift[source])
            counts = None if usable is None else usable[source, part]
            if counts is not None:
                block[~counts] = 0  # what is not finite there would not become zero by a factor
            self.moment[source, half].addmm_(block.T, block)
            yield source, block, counts


def of_halves(sums: Tensor, halves: tuple[int, ...]) -> Tensor:
    """Of ``(sources, 2, ...)`` the sums of one half, or of both."""
    return sums[:, halves[0]] if len(halves) == 1 else sums[:, 0] + sums[:, 1]


class Scaled:
    """Means and covariances of the features of each source, scaled to a spread of 1.

    Args:
        moment: ``(sources, features, features)``, about the shift.
        total: ``(sources, features)``, the sums about the shift.
        rows: ``(sources,)``.
        shift: ``(sources, features)``.
        resolution: as of :class:`Moments`.

    Attributes:
        mean: ``(sources, features)``, about the shift.
        spread: ``(sources, features)``, infinite where a feature is constant: it counts for nothing.
        live: ``(sources, features)``, where it is not.
        finite: ``(sources, features)``, the spread, or zero where it is infinite.
        covariance: ``(sources, features, features)``; a constant feature has no part in others.
    """

    def __init__(self, moment: Tensor, total: Tensor, rows: Tensor, shift: Tensor, resolution: float) -> None:
        safe = rows.clamp_min(1e-300)[:, None]
        self.rows, self.shift = rows, shift
        self.mean = total / safe
        raw = moment / safe[..., None] - self.mean[:, :, None] * self.mean[:, None]
        self.spread = spread_of(self.mean, raw.diagonal(dim1=1, dim2=2), shift, resolution)
        self.live = torch.isfinite(self.spread)
        self.finite = torch.where(self.live, self.spread, 0.0)
        self.covariance = raw.div_(self.spread[:, :, None]).div_(self.spread[:, None])
        self.covariance.diagonal(dim1=1, dim2=2).add_((~self.live).double())
        self._eigen: tuple[Tensor, Tensor] | None = None

    def solved(self, right: Tensor, penalty: Tensor) -> Tensor:
        """``(covariance + penalty)^-1 right``, ``(sources, concepts, k, features)``.

        Args:
            right: ``(sources, concepts, k, features)``.
            penalty: ``(sources, concepts)``.
        """
        values, which = penalty.unique(return_inverse=True)
        sources = torch.arange(len(penalty))[:, None]
        pairs, where = (which + len(values) * sources).unique(return_inverse=True)
        found = self._of_pairs(pairs // len(values), values[pairs % len(values)], right)
        return found[where, torch.arange(right.shape[1])]

    def with_each(self, penalties: Tensor, right: Tensor) -> Tensor:
        """The same with each of some penalties, ``(penalties, sources, concepts, k, features)``."""
        sources = torch.arange(len(right))
        found = self._of_pairs(sources.repeat(len(penalties)), penalties.repeat_interleave(len(sources)), right)
        return found.view(len(penalties), *right.shape)

    def _of_pairs(self, sources: Tensor, penalties: Tensor, right: Tensor) -> Tensor:
        """For pairs of a source and a penalty, ``(pairs, concepts, k, features)``."""
        flat, at_once = right.flatten(1, 2), max(1, _AT_ONCE // self.covariance[0].numel())
        parts = zip(sources.split(at_once), penalties[:, None].split(at_once), strict=True)
        found = torch.cat([self._solved(which, flat[which], penalty) for which, penalty in parts])
        return found.view(len(sources), *right.shape[1:])

    def _solved(self, sources: Tensor, right: Tensor, penalty: Tensor) -> Tensor:
        if self._eigen is None:
            matrices = self.covariance[sources]
            matrices.diagonal(dim1=1, dim2=2).add_(penalty)
            factors, failed = torch.linalg.cholesky_ex(matrices)
            diagonal = factors.diagonal(dim1=1, dim2=2)
            if not bool(failed.any()) and bool((diagonal.amin(1) > 1e-7 * diagonal.amax(1)).all()):
                return torch.cholesky_solve(right.mT, factors).mT
            self._eigen = tuple(torch.linalg.eigh(self.covariance))
        spectrum, vectors = (one[sources] for one in self._eigen)
        inverse = 1 / (spectrum + penalty).clamp_min(1e-9)
        return ((right @ vectors) * inverse[:, None]) @ vectors.mT
