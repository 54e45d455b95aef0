"""Probes of a bank with what they score on held-out rows, batch by batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.errors import listed
from tdhook_rl.latent.probing.bank import ClassBank, Probes
from tdhook_rl.latent.probing.held_out import HitTally, ScoreHistograms, Tally, widest
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.value_bank import ValueBank, ValueProbes
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import none

B = TypeVar("B")
S = TypeVar("S", bound="Scored")


@dataclass(frozen=True)
class Rows:
    """Rows of one site whose labels are known.

    Attributes:
        features: ``(rows, features)``.
        labels: ``(rows, concepts)``.
        codes: for each grouping ``(rows,)``, the number of the group of each row.
        train, held: ``(rows,)``: which the probes are fitted on, and which they are scored on.
    """

    features: Tensor
    labels: Tensor
    codes: Sequence[Tensor]
    train: Tensor
    held: Tensor

    @property
    def halves(self) -> Tensor:
        """Which half of the training groups a row is of, by the number of its first group."""
        code = self.codes[0]
        return ((code ^ (code >> 17)) >> 5) & 1


class Scored(Generic[B]):
    """The base: a bank, its probes as they are now, and the penalties they have.

    Args:
        penalty: of all probes; unless given the groups choose, and again when there are three times as many rows.
        confidence: of the intervals.
        min_rows: a class with fewer held-out rows is not scored.
    """

    bank: Any

    def __init__(self, *, penalty: float | None, confidence: float, min_rows: float) -> None:
        self.penalty, self.confidence, self.min_rows = penalty, confidence, min_rows
        self.probes: Any = None
        self._chosen: Tensor | None = None
        self._learnt = self._chosen_at = 0.0

    def learn(self, rows: Rows) -> None:
        """Add the training rows to the sums."""
        train, parts = rows.train, (rows.features, rows.labels, None if self.penalty is not None else rows.halves)
        if not bool(train.all()):
            parts = tuple(None if one is None else one[train] for one in parts)  # type: ignore[assignment]
        self.bank.add(*parts)
        self._learnt += float(train.sum())

    def fit(self) -> None:
        """Solve for the probes."""
        if not self._ready():
            return
        if self.penalty is not None:
            penalty = torch.full((self.width,), float(self.penalty), dtype=torch.float64)
        else:
            if self._chosen is None or self._learnt >= 3 * self._chosen_at:
                self._chosen, self._chosen_at = self.bank.choose(), self._learnt
            penalty = self._chosen
        self.probes = self.bank.solve(penalty)

    @property
    def width(self) -> int:
        """How many penalties there are."""
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError

    def __add__(self: S, other: S) -> S:
        """What two workers or shards have, together; the probes are solved anew."""
        merged = copy.deepcopy(self)
        merged.bank = self.bank + other.bank
        merged._learnt, merged._chosen = self._learnt + other._learnt, None
        merged._merge_scores(other)
        merged.fit()
        return merged

    def _merge_scores(self, other: Any) -> None:
        raise NotImplementedError


class ScoredClasses(Scored[ClassBank]):
    """Discriminants of several concepts, their balanced accuracies and areas under the curve.

    Args:
        features: the length of a feature vector.
        classes: for each concept how many classes it has.
        groupings: how many ways there are to group the rows.
        areas: of how many concepts, the first ones, areas under the curve are kept.
        options: as of :class:`Scored`.
    """

    probes: Probes | None

    def __init__(self, *, features: int, classes: Sequence[int], groupings: int, areas: int, **options: Any) -> None:
        super().__init__(**options)
        self.bank = ClassBank(features=features, classes=classes)
        self._most = max(classes)
        self._hits = HitTally(columns=len(classes) * self._most, groupings=groupings)
        self._binary = [index for index, count in enumerate(classes[:areas]) if count == 2]
        self._areas = ScoreHistograms(labels=len(self._binary), groupings=groupings) if self._binary else None

    @property
    def width(self) -> int:
        return len(self.bank.classes)

    def learn(self, rows: Rows) -> None:
        before = self.bank.there
        super().learn(rows)
        # While a class had no training row its held-out rows were wrong, whatever can be known of it.
        new = self.bank.there & ~before
        if bool(new.any()):
            self._hits.forget(new.reshape(-1))

    def widen(self, concept: int, classes: int) -> None:
        """Give a concept more classes than it had: a number was seen that is larger than those before."""
        before, most = self.bank.classes, self._most
        self.bank.widen(concept, classes)
        self._most = max(self.bank.classes)
        self.probes = None
        columns = torch.arange(self.width)[:, None] * self._most + torch.arange(most)
        self._hits = self._hits.spread(columns.reshape(-1), self.width * self._most)
        if before[concept] == 2 and concept in self._binary and self._areas is not None:
            place = self._binary.index(concept)
            self._binary.remove(concept)
            self._areas = self._areas.without(place) if self._binary else None

    def decay(self, factor: float) -> None:
        """Let rows of before count for less, in the fit and in the scores."""
        for one in (self.bank, self._hits, self._areas):
            if one is not None:
                one.decay(factor)

    def judge(self, rows: Rows) -> None:
        """Score the held-out rows by the probes as they are now."""
        if self.probes is None or not bool(rows.held.any()):
            return
        parts = [rows.labels, rows.features, *rows.codes]
        labels, features, *codes = parts if bool(rows.held.all()) else [one[rows.held] for one in parts]
        scores = self.probes.scores(features)
        of_class = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, labels[..., None], True)
        right = (scores.argmax(-1) == labels)[..., None] & of_class
        self._hits.add(codes, of_class.flatten(1), right.flatten(1))
        if self._areas is not None:
            binary = self._binary
            margins = (scores[..., 1] - scores[..., 0])[:, binary]
            self._areas.add(
                codes, margins, labels[:, binary] == 1, self.probes.middle[binary], self.probes.spread[binary]
            )

    def score(self, concept: int) -> Interval:
        """The balanced accuracy of one concept."""
        return self._hits.accuracy(self._columns(concept, self._enough(concept)), self.confidence)

    def found(self, concept: int) -> dict[str, Interval]:
        """The scores of one concept: ``"accuracy"`` (balanced), and ``"auc"`` of two classes."""
        enough, found = self._enough(concept), {"accuracy": self.score(concept)}
        if self._areas is not None and concept in self._binary:
            area = self._areas.area(self._binary.index(concept), self.confidence)
            if not bool(enough[:2].all()):  # what is too little for one is too little for the other
                area = none(
                    math.nan, "too few rows of a class", confidence=self.confidence, groups=area.groups, rows=area.rows
                )
            found["auc"] = area
        return found

    def words(self, concept: int) -> str:
        """Why there is no score, or what was left out of it."""
        there, rows, enough = self.bank.there[concept], self._rows(concept), self._enough(concept)
        if int(there.sum()) < 2:
            return "no probe yet: the training rows hold one class or none"
        if not bool((rows > 0).any()):
            return "no held-out row yet: the split has held out no group of these rows"
        few = ((rows > 0) & ~enough).nonzero().squeeze(-1).tolist()
        unseen = ((rows > 0) & ~there).nonzero().squeeze(-1).tolist()
        said = [f"left out, fewer than {self.min_rows:g} held-out rows: class {listed(few, 6)}"] if few else []
        return "; ".join(said + ([f"wrong, without a training row: class {listed(unseen, 6)}"] if unseen else []))

    def difference(self, other: ScoredClasses, concept: int, others: int) -> Interval:
        """The balanced accuracy of a concept minus that of one of another bank, by group."""
        found = []
        own = self._columns(concept, self._enough(concept))
        theirs = other._columns(others, other._enough(others))
        for mine, its in zip(self._hits.tables, other._hits.tables, strict=True):
            codes, first, second = _aligned(mine, its)
            if codes is None:
                return none(
                    math.nan, "the two were grouped in other ways", confidence=self.confidence, groups=0, rows=0.0
                )
            parts = self._hits.counts(first, own), other._hits.counts(second, theirs)
            found.append(statistics.accuracy_difference(*parts[0], *parts[1], confidence=self.confidence))
        return widest(found)

    def majority(self, concept: int) -> float:
        """The share of the most frequent class among the held-out rows."""
        rows = self._rows(concept)
        return float(rows.max() / rows.sum()) if float(rows.sum()) else math.nan

    def chance(self, concept: int) -> float:
        """The balanced accuracy of a guess."""
        count = int(self._enough(concept).sum())
        return 1 / count if count > 1 else math.nan

    def probe(self, concept: int, path: str, facts: dict[str, float]) -> LinearProbe | None:
        """The probe of one concept."""
        if self.probes is None or int(self.probes.there[concept].sum()) < 2:
            return None
        return self.probes.one(concept, self.bank.classes[concept], path, facts)

    def _merge_scores(self, other: ScoredClasses) -> None:
        self._hits.merge(other._hits)
        if self._areas is not None and other._areas is not None:
            self._areas.merge(other._areas)

    def _ready(self) -> bool:
        return bool((self.bank.there.sum(-1) > 1).any())

    def _rows(self, concept: int) -> Tensor:
        return self._hits.rows.reshape(-1, self._most)[concept]

    def _enough(self, concept: int) -> Tensor:
        return self._rows(concept) > self.min_rows - 1e-6

    def _columns(self, concept: int, classes: Tensor) -> Tensor:
        columns = torch.zeros(self.width, self._most, dtype=torch.bool)
        columns[concept] = classes
        return columns.reshape(-1)


class ScoredValues(Scored[ValueBank]):
    """Ridge regressions of several numbers, and the shares of variance that they explain.

    Args:
        features: the length of a feature vector.
        numbers: how many numbers a row has.
        groupings: how many ways there are to group the rows.
        options: as of :class:`Scored`.
    """

    probes: ValueProbes | None

    def __init__(self, *, features: int, numbers: int, groupings: int, **options: Any) -> None:
        super().__init__(**options)
        self.bank = ValueBank(features=features, numbers=numbers)
        self._sums = [Tally(width=4 * numbers) for _ in range(groupings)]
        self._about: Tensor | None = None

    @property
    def width(self) -> int:
        return len(self.bank.target_shift)

    def decay(self, factor: float) -> None:
        """Let rows of before count for less, in the fit and in the scores."""
        for one in (self.bank, *self._sums):
            one.decay(factor)

    def judge(self, rows: Rows) -> None:
        """Score the held-out rows by the probes as they are now."""
        if self.probes is None or not bool(rows.held.any()):
            return
        labels = rows.labels[rows.held].double()
        wrong = self.probes.predict(rows.features[rows.held]) - labels
        if self._about is None:
            self._about = self.bank.target_shift.clone()
        about = labels - self._about
        values = torch.stack([torch.ones_like(about), about, about.square(), wrong.square()], -1).flatten(1)
        for tally, code in zip(self._sums, rows.codes, strict=True):
            tally.add(code[rows.held], values)

    def score(self, concept: int) -> Interval:
        """The share of variance of one number that is explained."""
        return widest([
            statistics.r_squared(self._of(tally.sums, concept), confidence=self.confidence) for tally in self._sums
        ])  # fmt: skip

    def found(self, concept: int) -> dict[str, Interval]:
        """The score of one number, ``"r2"``."""
        return {"r2": self.score(concept)}

    def words(self, concept: int) -> str:
        """Why there is no score."""
        if not self._ready():
            return "no probe yet: there are no two training rows"
        if not float(self._of(self._sums[0].sums, concept)[:, 0].sum()):
            return "no held-out row yet: the split has held out no group of these rows"
        return ""

    def difference(self, other: ScoredValues, concept: int, others: int) -> Interval:
        """The share of variance explained minus that of a number of another bank, by group."""
        found = []
        for mine, its in zip(self._sums, other._sums, strict=True):
            codes, first, second = _aligned(mine, its)
            if codes is None:
                return none(
                    math.nan, "the two were grouped in other ways", confidence=self.confidence, groups=0, rows=0.0
                )
            parts = self._of(first, concept), other._of(second, others)
            found.append(statistics.r_squared_difference(*parts, confidence=self.confidence))
        return widest(found)

    def majority(self, concept: int) -> float:
        """What the mean explains."""
        return 0.0

    def chance(self, concept: int) -> float:
        """What the mean explains."""
        return 0.0

    def probe(self, concept: int, path: str, facts: dict[str, float]) -> LinearProbe | None:
        """The probe of one number."""
        return None if self.probes is None else self.probes.one(slice(concept, concept + 1), path, facts)

    def _merge_scores(self, other: ScoredValues) -> None:
        if other._about is None:
            return
        if self._about is None:
            self._about = other._about
        apart = other._about - self._about
        for tally, its in zip(self._sums, other._sums, strict=True):
            rows, values, squares, errors = its.sums.reshape(-1, self.width, 4).unbind(-1)
            moved = [rows, values + rows * apart, squares + 2 * apart * values + rows * apart.square(), errors]
            tally.add(its.codes, torch.stack(moved, -1).flatten(1))

    def _ready(self) -> bool:
        return float(self.bank.rows.sum()) > 1

    def _of(self, sums: Tensor, concept: int) -> np.ndarray:
        return sums.reshape(-1, self.width, 4)[:, concept].numpy()


def _aligned(first: Tally, second: Tally) -> tuple[Tensor | None, Tensor, Tensor]:
    """The groups of two tallies, and their sums in the same order."""
    if first.folded != second.folded:
        return None, first.sums, second.sums
    codes = torch.cat([first.codes, second.codes]).unique()
    found = []
    for tally in (first, second):
        sums = torch.zeros(len(codes), tally.sums.shape[1], dtype=torch.float64)
        sums[torch.searchsorted(codes, tally.codes)] = tally.sums
        found.append(sums)
    return codes, found[0], found[1]
