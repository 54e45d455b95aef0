"""Many concepts of several sources at once: their rows, their sums and their probes share what they have in common.

The second moments of the features are those of all concepts, so that one factorisation serves all probes of a source.
What is kept is a sum: it streams, decays, and adds up over workers and shards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import NEVER, usual_penalty
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import raw_bias
from tdhook_rl.latent.probing.penalties import PENALTIES, expected_accuracy
from tdhook_rl.latent.probing.stacked import Scaled, StackedMoments, of_halves

#: Below this share of all rows, a class that decays is forgotten.
_FORGOTTEN = 1e-9


@dataclass(frozen=True)
class Probes:
    """The probes of all sources and concepts of a bank.

    Attributes:
        weight: ``(sources, concepts, classes, features)``, float32.
        bias: ``(sources, concepts, classes)``, float64.
        there: ``(sources, concepts, classes)``, which classes had training rows.
        penalty: ``(sources, concepts)``, what each was fitted with.
        middle, spread: ``(sources, concepts)``, of the difference of the scores of classes 1 and 0: halfway between
            the means of the two, and within them.
        apart: ``(sources, concepts)``, how far the means of the two lie from each other along the direction of that
            difference.
    """

    weight: Tensor
    bias: Tensor
    there: Tensor
    penalty: Tensor
    middle: Tensor
    spread: Tensor
    apart: Tensor

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """``(rows, sources, concepts, classes)`` of the rows of each source, in float64."""
        flat = self.weight.double().flatten(1, 2)
        found = torch.empty(len(features[0]), *self.bias.shape, dtype=torch.float64)
        for source, rows in enumerate(features):
            torch.addmm(self.bias[source].flatten(), rows.double(), flat[source].T, out=found[:, source].flatten(1, 2))
        return found

    def one(self, source: int, concept: int, classes: int, path: str, facts: dict[str, float]) -> LinearProbe:
        """The probe of one concept, to read out, to push and to save."""
        apart = {"means_apart": float(self.apart[source, concept])} if classes == 2 else {}
        return LinearProbe(
            weight=self.weight[source, concept, :classes].clone(), bias=self.bias[source, concept, :classes].clone(),
            kind="lda", path=path, facts={**facts, **apart, "penalty": float(self.penalty[source, concept])},
        )  # fmt: skip


class ClassBank(StackedMoments):
    """Linear discriminants (Fisher 1936) of several concepts from sums, each as :class:`ClassStatistics` solves one.

    The training groups are kept as two halves, whose sums are those of all; they serve to choose the penalty.

    Args:
        sources, features: as of :class:`StackedMoments`.
        classes: for each concept how many classes it has.

    Attributes:
        shift, moment: as of :class:`StackedMoments`.
        count: ``(sources, 2, concepts, classes)``, rows.
        total: ``(sources, 2, concepts, classes, features)``, the sums of ``x - shift``.

    Example:
        >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> bank = ClassBank(sources=1, features=3, classes=[2, 2])
        >>> bank.add([x], torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1).long(), torch.arange(400).chunk(2))
        >>> right = bank.solve().scores([x])[:, 0].argmax(-1) == torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1)
        >>> right.double().mean() > 0.9
        tensor(True)
    """

    _sums = ("moment", "count", "total")

    @torch.inference_mode(False)
    def __init__(self, *, sources: int, features: int, classes: Sequence[int]) -> None:
        if not classes or min(classes) < 2:
            raise InputError(f"a bank is of concepts of at least 2 classes, got {classes}")
        super().__init__(sources=sources, features=features)
        self.classes = tuple(classes)
        concepts, most = len(classes), max(classes)
        self.count = torch.zeros(sources, 2, concepts, most, dtype=torch.float64)
        self.total = torch.zeros(sources, 2, concepts, most, features, dtype=torch.float64)

    @property
    def there(self) -> Tensor:
        """Which classes have rows, ``(sources, concepts, classes)``."""
        count = self.count.sum(1)
        return count > _FORGOTTEN * count.sum(-1, keepdim=True)

    @torch.inference_mode(False)
    def add(
        self, features: Sequence[Tensor], labels: Tensor, halves: Sequence[Tensor], usable: Tensor | None = None
    ) -> None:
        """Add training rows.

        Args:
            features: for each source ``(rows, features)``.
            labels: ``(rows, concepts)``, int64, the number of a class each.
            halves: the numbers of the training rows of each half, ascending; with one half only, nothing can be chosen.
            usable: ``(sources, rows)``, which rows are finite and count; all unless given.
        """
        if not sum(map(len, halves)):
            return
        self._start(features, halves, usable)
        concepts, most = self.count.shape[2:]
        for half, part, sources in self._halves(features, halves, usable):
            hot = torch.zeros(len(part), concepts, most, dtype=torch.float64)
            hot = hot.scatter_(2, labels[part][..., None], 1.0).flatten(1)
            if usable is None:
                self.count[:, half] += hot.sum(0).view(concepts, most)
            for source, block, counts in sources:
                self.total[source, half].flatten(0, 1).addmm_(hot.T, block)
                if counts is not None:
                    self.count[source, half] += (counts.double() @ hot).view(concepts, most)

    @torch.inference_mode(False)
    def __add__(self, other: ClassBank) -> ClassBank:
        if self.classes != other.classes or self.shift.shape != other.shift.shape:
            raise InputError(
                f"sums of {self.classes} classes of {tuple(self.shift.shape)} (sources, features) and of "
                f"{other.classes} of {tuple(other.shift.shape)} do not add"
            )
        if not other._begun:
            return copy.deepcopy(self)
        if not self._begun:
            return copy.deepcopy(other)
        merged = copy.deepcopy(self)
        away = (other.shift - self.shift)[:, None, None]  # (sources, 1, 1, features)
        rows = other.count[:, :, 0].sum(-1)  # of each half: every row has a class of every concept
        crossed = other.total[:, :, 0].sum(2)[..., None] * away
        merged.moment += other.moment + crossed + crossed.mT
        merged.moment += rows[..., None, None] * away.mT * away
        merged.count += other.count
        merged.total += other.total + other.count[..., None] * away[:, None]
        merged.resolution = max(self.resolution, other.resolution)
        return merged

    def widen(self, concept: int, classes: int) -> None:
        """Give a concept more classes than it had."""
        self.classes = (*self.classes[:concept], classes, *self.classes[concept + 1 :])
        more = max(self.classes) - self.count.shape[-1]
        if more > 0:
            self.count = torch.nn.functional.pad(self.count, (0, more))
            self.total = torch.nn.functional.pad(self.total, (0, 0, 0, more))

    def solve(self, penalty: Tensor | None = None, priors: str = "equal") -> Probes:
        """The probes of all concepts.

        Args:
            penalty: ``(sources, concepts)``, added to the diagonal of the covariance of scaled features; by default
                what :func:`usual_penalty` says.
            priors: ``"equal"`` or ``"rows"``.
        """
        return self._of((0, 1)).probes(penalty, priors)

    def choose(self) -> Tensor:
        """The penalty of each concept that does best across the two halves, ``(sources, concepts)``.

        The usual one where a half lacks classes, or nothing can be told apart.
        """
        halves = [self._of((half,)) for half in (0, 1)]
        usual = [usual_penalty(self.width, max(rows, 1.0)) for rows in self.count[:, :, 0].sum((1, 2)).tolist()]
        chosen = torch.tensor(usual, dtype=torch.float64)[:, None].expand(-1, len(self.classes))
        enough = torch.stack([one.rows > 1 for one in halves]).all(0)
        if not bool(enough.any()):
            return chosen
        tried = torch.tensor(PENALTIES, dtype=torch.float64)
        first, second = halves
        found = first.expected(second, tried) + second.expected(first, tried)  # (penalties, sources, concepts)
        # Of those that do as well the largest: what the data do not tell apart, the simpler probe has.
        good = found >= found.amax(0) - 2e-4
        largest = len(tried) - 1 - good.flip(0).long().argmax(0)
        return torch.where(torch.isfinite(found).all(0) & enough[:, None], tried[largest], chosen)

    def _of(self, halves: tuple[int, ...]) -> _Sums:
        moment, count, total = (of_halves(getattr(self, name), halves) for name in self._sums)
        return _Sums(moment, count, total, self.shift, self.resolution)


class _Sums(Scaled):
    """What is solved: sums of some of the rows."""

    def __init__(self, moment: Tensor, count: Tensor, total: Tensor, shift: Tensor, resolution: float) -> None:
        super().__init__(moment, total[:, 0].sum(1), count[:, 0].sum(1), shift, resolution)
        self.there = count > _FORGOTTEN * count.sum(-1, keepdim=True)
        self.share = count / count.sum(-1, keepdim=True).clamp_min(1e-300)
        offsets = (total / count.clamp_min(1e-300)[..., None] - self.mean[:, None, None]) / self.spread[:, None, None]
        self.offsets = torch.where(self.there[..., None], offsets, 0.0)

    def probes(self, penalty: Tensor | None, priors: str) -> Probes:
        if penalty is None:
            usual = map(usual_penalty, self.live.sum(1).tolist(), self.rows.clamp_min(1).tolist())
            penalty = torch.tensor(list(usual), dtype=torch.float64)[:, None].expand(self.there.shape[:2])
        found = self._within(self.solved(self.offsets, penalty))
        weight, number = self._weights(found), self.there.sum(-1, keepdim=True).clamp_min(1)
        priors_of = torch.where(self.there, self.share, 1.0).log() if priors == "rows" else torch.zeros_like(self.share)
        at_mean = priors_of - 0.5 * (found * self.offsets).sum(-1)
        at_mean = at_mean - ((at_mean * self.there).sum(-1, keepdim=True) / number)
        stored, bias = raw_bias(weight.flatten(1, 2), self.mean + self.shift, torch.zeros(()).double())
        bias = torch.where(self.there, bias.view_as(at_mean) + at_mean, NEVER)
        stored = stored.view_as(weight)
        return Probes(stored, bias, self.there, penalty, *self._margins(stored, bias))

    def expected(self, other: _Sums, penalties: Tensor) -> Tensor:
        """How well the probes of others, with each penalty, tell the classes of these rows apart.

        Returns:
            ``(penalties, sources, concepts)``, of :func:`expected_accuracy`.
        """
        weight = other._weights(other._within(other.with_each(penalties, other.offsets)))
        scaled = weight * self.finite[:, None, None]
        outside = ((weight != 0) & ~self.live[:, None, None]).flatten(3).any(-1)
        found = expected_accuracy(scaled, self.offsets, self._within_scores(scaled), self.there & other.there)
        return found.masked_fill(outside, torch.nan)

    def _weights(self, found: Tensor) -> Tensor:
        """Of scaled features to features, ``(..., sources, concepts, classes, features)``.

        What all classes have in common decides nothing; without it, scores stay small far from the mean.
        """
        number = self.there.sum(-1)[..., None, None].clamp_min(1)
        centred = torch.where(self.there[..., None], found - found.sum(-2, keepdim=True) / number, 0.0)
        return centred / self.spread[:, None, None]

    def _within(self, solved: Tensor) -> Tensor:
        """``(W + penalty)^-1`` of the offsets, ``W`` the covariance within the classes of each concept.

        ``W`` is the covariance of all rows less a product of rank ``classes``, so that one factorisation of that serves
        all concepts (Sherman, Morrison & Woodbury 1950).

        Args:
            solved: the same of the covariance of all rows, ``(..., sources, concepts, classes, features)``.
        """
        gram = self.offsets @ solved.mT
        root = self.share.sqrt()
        one = torch.eye(gram.shape[-1], dtype=gram.dtype)
        left = one - root[..., None] * gram * root[..., None, :]
        values, vectors = torch.linalg.eigh((left + left.mT) / 2)
        inverse = (vectors / values.clamp_min(1e-9)[..., None, :]) @ vectors.mT
        # offsets^T root (left)^-1 root^-1, written so that no class without rows divides by zero
        more = root[..., None] * (inverse - one)
        scale = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
        return solved + (more * scale[..., None, :]).mT @ solved

    def _within_scores(self, weight: Tensor) -> Tensor:
        """``(..., sources, concepts, k, k)``, of scores within classes; the weight is of scaled features."""
        between = weight @ self.offsets.mT
        of_all = (weight.flatten(-3, -2) @ self.covariance).view_as(weight) @ weight.mT
        return of_all - (between * self.share[:, :, None]) @ between.mT

    def _margins(self, stored: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the difference of classes 1 and 0: the score halfway between their means, its spread within them, and how
        far apart they lie along its direction."""
        weight = (stored[:, :, 1:2] - stored[:, :, :1]).double()
        scaled = weight * self.finite[:, None, None]
        first, second = self.offsets[:, :, 0], self.offsets[:, :, 1]
        halfway = scaled[:, :, 0] * (first + second) / 2 + weight[:, :, 0] * (self.mean + self.shift)[:, None]
        spread = self._within_scores(scaled).flatten(2).squeeze(-1).clamp_min(0).sqrt()
        apart = (scaled[:, :, 0] * (second - first)).sum(-1) / weight.norm(dim=(2, 3)).clamp_min(1e-300)
        return halfway.sum(-1) + bias[..., 1] - bias[..., 0], spread, apart
