"""Many concepts of one site at once: their rows, their sums and their probes share what they have in common.

The second moments of the features are those of all concepts, so that one factorisation serves all probes of a site.
What is kept is a sum: it streams, decays, and adds up over workers and shards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import NEVER, usual_penalty
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import Moments, blocks_about, raw_bias, spread_of
from tdhook_rl.latent.probing.penalties import PENALTIES, expected_accuracy

#: Below this share of all rows, a class that decays is forgotten.
_FORGOTTEN = 1e-9
#: So many penalties are solved for one by one.
_FEW = 3


@dataclass(frozen=True)
class Probes:
    """The probes of all concepts of a bank.

    Attributes:
        weight: ``(concepts, classes, features)``, float32.
        bias: ``(concepts, classes)``, float64.
        there: ``(concepts, classes)``, which classes had training rows.
        penalty: ``(concepts,)``, what each was fitted with.
        middle, spread: ``(concepts,)``, of the difference of the scores of classes 1 and 0: halfway between the means
            of the two, and within them.
        apart: ``(concepts,)``, how far the means of the two lie from each other along the direction of that difference.
    """

    weight: Tensor
    bias: Tensor
    there: Tensor
    penalty: Tensor
    middle: Tensor
    spread: Tensor
    apart: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """``(rows, concepts, classes)`` of rows, in float64; for each row its block of concepts."""
        concepts, classes, width = self.weight.shape
        flat = self.weight.double().reshape(-1, width)
        return torch.addmm(self.bias.reshape(-1), features.double(), flat.T).reshape(-1, concepts, classes)

    def one(self, concept: int, classes: int, path: str, facts: dict[str, float]) -> LinearProbe:
        """The probe of one concept, to read out, to push and to save."""
        apart = {"means_apart": float(self.apart[concept])} if classes == 2 else {}
        return LinearProbe(
            weight=self.weight[concept, :classes].clone(), bias=self.bias[concept, :classes].clone(), kind="lda",
            path=path, facts={**facts, **apart, "penalty": float(self.penalty[concept])},
        )  # fmt: skip


class ClassBank(Moments):
    """Linear discriminants (Fisher 1936) of several concepts from sums, each as :class:`ClassStatistics` solves one.

    The training groups are kept as two halves, whose sums are those of all; they serve to choose the penalty.

    Args:
        features: the length of a feature vector.
        classes: for each concept how many classes it has.

    Attributes:
        shift: ``(features,)``, the mean of the first rows; everything is kept about it, in float64.
        moment: ``(2, features, features)``, the sum of ``(x - shift) (x - shift)^T`` of each half.
        count: ``(2, concepts, classes)``, rows.
        total: ``(2, concepts, classes, features)``, the sums of ``x - shift``.

    Example:
        >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> bank = ClassBank(features=3, classes=[2, 2])
        >>> bank.add(x, torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1).long(), torch.arange(400) % 2)
        >>> bank.solve().scores(x).argmax(-1).eq(torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1)).double().mean() > 0.9
        tensor(True)
    """

    _sums = ("moment", "count", "total")

    @torch.inference_mode(False)
    def __init__(self, *, features: int, classes: Sequence[int]) -> None:
        if not classes or min(classes) < 2:
            raise InputError(f"a bank is of concepts of at least 2 classes, got {classes}")
        super().__init__(features=features, parts=(2,))
        self.classes = tuple(classes)
        concepts, most = len(classes), max(classes)
        self.count = torch.zeros(2, concepts, most, dtype=torch.float64)
        self.total = torch.zeros(2, concepts, most, features, dtype=torch.float64)

    @property
    def there(self) -> Tensor:
        """Which classes have rows, ``(concepts, classes)``."""
        count = self.count.sum(0)
        return count > _FORGOTTEN * count.sum(-1, keepdim=True)

    @torch.inference_mode(False)
    def add(self, features: Tensor, labels: Tensor, halves: Tensor | None) -> None:
        """Add training rows.

        Args:
            features: ``(rows, features)``, finite.
            labels: ``(rows, concepts)``, int64, the number of a class each.
            halves: ``(rows,)``, 0 or 1; ``None`` puts all into the first: nothing can be chosen by halves then.
        """
        if not len(features):
            return
        self._begin(features)
        concepts, most = self.count.shape[1:]
        for half in (0,) if halves is None else (0, 1):
            rows, wanted = (one if halves is None else one[halves == half] for one in (features, labels))
            for part, block in blocks_about(self.shift, rows):
                hot = torch.zeros(len(block), concepts, most, dtype=torch.float64)
                hot.scatter_(2, wanted[part][..., None], 1.0)
                self.moment[half].addmm_(block.T, block)
                self.total[half].view(-1, self.width).addmm_(hot.view(len(block), -1).T, block)
                self.count[half] += hot.sum(0)

    @torch.inference_mode(False)
    def __add__(self, other: ClassBank) -> ClassBank:
        if self.classes != other.classes or self.width != other.width:
            raise InputError(
                f"sums of {self.classes} classes of {self.width} features and of {other.classes} of {other.width} do "
                "not add"
            )
        if not other._begun:
            return copy.deepcopy(self)
        if not self._begun:
            return copy.deepcopy(other)
        merged = copy.deepcopy(self)
        away = other.shift - self.shift
        rows = other.count[:, 0].sum(-1)  # of each half: every row has a class of every concept
        crossed = other.total[:, 0].sum(1)[:, :, None] * away
        merged.moment += other.moment + crossed + crossed.transpose(1, 2)
        merged.moment += rows[:, None, None] * torch.outer(away, away)
        merged.count += other.count
        merged.total += other.total + other.count[..., None] * away
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
            penalty: ``(concepts,)``, added to the diagonal of the covariance of scaled features; by default what
                :func:`usual_penalty` says.
            priors: ``"equal"`` or ``"rows"``.
        """
        return self._parts((0, 1)).solve(penalty, priors)

    def choose(self) -> Tensor:
        """The penalty of each concept that does best across the two halves, ``(concepts,)``.

        The usual one where a half lacks classes, or nothing can be told apart.
        """
        halves = [self._parts((half,)) for half in (0, 1)]
        usual = usual_penalty(self.width, float(self.count[:, 0].sum()))
        chosen = torch.full((len(self.classes),), usual, dtype=torch.float64)
        if any(one.rows <= 1 for one in halves):
            return chosen
        # Every penalty as if it were a concept more: one factorisation of each half, and one pass of small products.
        tried = torch.tensor(PENALTIES, dtype=torch.float64).repeat_interleave(len(chosen))
        repeated = [one.repeated(len(PENALTIES)) for one in halves]
        found = sum(
            judging.expected(fitted.solve(tried, "equal")) for fitted, judging in (repeated, repeated[::-1])
        ).reshape(len(PENALTIES), -1)  # type: ignore[union-attr]
        known = torch.isfinite(found).all(0)
        # Of those that do as well the largest: what the data do not tell apart, the simpler probe has.
        good = found >= found.amax(0) - 2e-4
        largest = len(PENALTIES) - 1 - good.flip(0).long().argmax(0)
        return torch.where(known, torch.tensor(PENALTIES, dtype=torch.float64)[largest], chosen)

    def _parts(self, halves: tuple[int, ...]) -> _Sums:
        moment, count, total = (getattr(self, name)[list(halves)].sum(0) for name in self._sums)
        return _Sums(moment, count, total, self.shift, self.resolution)


class _Sums:
    """What is solved: sums of some of the rows, as means and covariances of scaled features."""

    def __init__(self, moment: Tensor, count: Tensor, total: Tensor, shift: Tensor, resolution: float) -> None:
        self.count, self.shift = count, shift
        self.rows = float(count[0].sum())
        safe = max(self.rows, 1e-300)
        self.mean = total[0].sum(0) / safe
        covariance = moment / safe - torch.outer(self.mean, self.mean)
        spread = spread_of(self.mean, covariance.diagonal(), shift, resolution)
        self.live = torch.isfinite(spread).nonzero().squeeze(-1)
        self.spread = spread[self.live]
        self.covariance = covariance[self.live][:, self.live] / torch.outer(self.spread, self.spread)
        self.there = count > _FORGOTTEN * count.sum(-1, keepdim=True)
        self.share = count / count.sum(-1, keepdim=True).clamp_min(1e-300)
        offsets = (total / count.clamp_min(1e-300)[..., None] - self.mean)[..., self.live] / self.spread
        self.offsets = torch.where(self.there[..., None], offsets, 0.0)
        self._eigen: Any = None

    def solve(self, penalty: Tensor | None, priors: str) -> Probes:
        concepts, most = self.count.shape
        width = len(self.mean)
        if penalty is None:
            penalty = torch.full((concepts,), usual_penalty(len(self.live), self.rows), dtype=torch.float64)
        found = self._found(penalty)
        number = self.there.sum(-1, keepdim=True).clamp_min(1)
        # What all classes have in common decides nothing; without it, scores stay small far from the mean.
        centred = torch.where(self.there[..., None], found - (found.sum(1) / number)[:, None], 0.0)
        weight = torch.zeros(concepts, most, width, dtype=torch.float64)
        weight[..., self.live] = centred / self.spread
        priors_of = torch.where(self.there, self.share, 1.0).log() if priors == "rows" else torch.zeros_like(self.share)
        at_mean = priors_of - 0.5 * (found * self.offsets).sum(-1)
        at_mean = at_mean - ((at_mean * self.there).sum(-1, keepdim=True) / number)
        stored, bias = raw_bias(
            weight.reshape(-1, width), self.mean + self.shift, torch.zeros(concepts * most).double()
        )
        bias = torch.where(self.there, bias.reshape(concepts, most) + at_mean, NEVER)
        stored = stored.reshape(concepts, most, width)
        return Probes(stored, bias, self.there, penalty, *self._margins(stored, bias))

    def expected(self, probes: Probes) -> Tensor:
        """How well the probes of others tell the classes of these rows apart; see :func:`expected_accuracy`."""
        weight = probes.weight.double()[..., self.live] * self.spread
        outside = probes.weight.double().clone()
        outside[..., self.live] = 0
        within = self._within_scores(weight)
        return torch.where(
            (outside == 0).all(-1).all(-1), expected_accuracy(weight, self.offsets, within, self.there & probes.there),
            torch.nan,
        )  # fmt: skip

    def repeated(self, times: int) -> _Sums:
        """The same sums, of so many times the concepts."""
        other = copy.copy(self)
        other.count, other.there, other.share, other.offsets = (
            one.repeat(times, *(1,) * (one.ndim - 1)) for one in (self.count, self.there, self.share, self.offsets)
        )
        return other

    def _found(self, penalty: Tensor) -> Tensor:
        """``(W + penalty)^-1`` of the offsets, ``W`` the covariance within the classes of each concept.

        ``W`` is the covariance of all rows less a product of rank ``classes``, so that one factorisation of that serves
        all concepts (Sherman, Morrison & Woodbury 1950).
        """
        offsets, share = self.offsets, self.share
        solved = self._solved(penalty)
        gram = offsets @ solved.transpose(1, 2)
        root = share.sqrt()
        one = torch.eye(gram.shape[-1], dtype=gram.dtype)
        left = one - root[:, :, None] * gram * root[:, None, :]
        values, vectors = torch.linalg.eigh((left + left.transpose(1, 2)) / 2)
        inverse = vectors @ ((1 / values.clamp_min(1e-9))[..., None] * vectors.transpose(1, 2))
        # offsets^T root (left)^-1 root^-1, written so that no class without rows divides by zero
        more = root[:, :, None] * (inverse - one)
        scale = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
        return solved + (more * scale[:, None, :]).transpose(1, 2) @ solved

    def _solved(self, penalty: Tensor) -> Tensor:
        """``(covariance + penalty)^-1`` of the offsets, ``(concepts, classes, features)``."""
        offsets, values = self.offsets, penalty.unique()
        if not offsets.shape[-1]:
            return offsets
        if len(values) <= _FEW and self._eigen is None:
            found = torch.empty_like(offsets)
            for value in values:
                chosen = penalty == value
                matrix = self.covariance.clone()
                matrix.diagonal().add_(value)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                diagonal = factor.diagonal()
                if bool(failed) or not bool(diagonal.min() > 1e-7 * diagonal.max()):
                    break
                right = offsets[chosen].flatten(0, 1)
                found[chosen] = torch.cholesky_solve(right.T, factor).T.reshape(-1, *offsets.shape[1:])
            else:
                return found
        if self._eigen is None:
            self._eigen = tuple(torch.linalg.eigh(self.covariance))
        spectrum, vectors = self._eigen
        inverse = 1 / (spectrum + penalty[:, None]).clamp_min(1e-9)
        return ((offsets @ vectors) * inverse[:, None]) @ vectors.T

    def _within_scores(self, weight: Tensor) -> Tensor:
        """``(concepts, classes, classes)``, of scores within classes; the weight is of scaled features."""
        between = weight @ self.offsets.transpose(1, 2)
        of_all = weight @ self.covariance @ weight.transpose(1, 2)
        return of_all - (between * self.share[:, None, :]) @ between.transpose(1, 2)

    def _margins(self, stored: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the difference of classes 1 and 0: the score halfway between their means, its spread within them, and how
        far apart they lie along its direction."""
        weight = (stored[:, 1] - stored[:, 0]).double()
        scaled = weight[:, self.live] * self.spread
        halfway = self.offsets[:, :2].mean(1)
        middle = (scaled * halfway).sum(-1) + weight @ (self.mean + self.shift) + bias[:, 1] - bias[:, 0]
        apart = (scaled * (self.offsets[:, 1] - self.offsets[:, 0])).sum(-1) / weight.norm(dim=-1).clamp_min(1e-300)
        return middle, self._within_scores(scaled[:, None])[:, 0, 0].clamp_min(0).sqrt(), apart
