"""Probes of a bank with what they score on held-out rows, batch by batch; for each source and concept of the bank."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.errors import listed
from tdhook_rl.latent.probing.bank import ClassBank, Probes
from tdhook_rl.latent.probing.held_out import HitTally, ScoreHistograms, Tally, aligned, widest
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.rows import Rows
from tdhook_rl.latent.probing.value_bank import ValueBank, ValueProbes
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import none

B = TypeVar("B")
S = TypeVar("S", bound="Scored")


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
        parts, usable = rows.parts, rows.usable
        halves = parts.halves if self.penalty is None else (parts.trained,)
        self.bank.add(rows.features, rows.labels, halves, usable)
        self._learnt += len(parts.trained) if usable is None else float(usable[:, parts.trained].any(0).sum())

    def fit(self) -> None:
        """Solve for the probes."""
        if not self._ready():
            return
        if self.penalty is not None:
            penalty = torch.full((len(self.bank.shift), self.width), float(self.penalty), dtype=torch.float64)
        else:
            if self._chosen is None or self._learnt >= 3 * self._chosen_at:
                self._chosen, self._chosen_at = self.bank.choose(), self._learnt
            penalty = self._chosen
        self.probes = self.bank.solve(penalty)

    @property
    def width(self) -> int:
        """How many penalties each source has."""
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
        sources: of how many sources.
        features: the length of a feature vector.
        classes: for each concept how many classes it has.
        groupings: how many ways there are to group the rows.
        areas: of how many concepts, the first ones, areas under the curve are kept.
        options: as of :class:`Scored`.
    """

    probes: Probes | None

    def __init__(
        self, *, sources: int, features: int, classes: Sequence[int], groupings: int, areas: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self.bank = ClassBank(sources=sources, features=features, classes=classes)
        self._most = max(classes)
        self._hits = HitTally(columns=sources * len(classes) * self._most, groupings=groupings)
        self._binary = [index for index, count in enumerate(classes[:areas]) if count == 2]
        self._areas: ScoreHistograms | None = None
        if self._binary:
            self._areas = ScoreHistograms(labels=len(self._binary), groupings=groupings, sources=sources)

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
        """Give a concept more classes than it had: a number was seen that is larger than those before.

        Where there are probes they are solved for again: what is held out may be all that follows.
        """
        before, most, fitted = self.bank.classes, self._most, self.probes is not None
        self.bank.widen(concept, classes)
        self._most = max(self.bank.classes)
        self.probes = None
        lines = len(self.bank.shift) * self.width
        columns = torch.arange(lines)[:, None] * self._most + torch.arange(most)
        self._hits = self._hits.spread(columns.reshape(-1), lines * self._most)
        if before[concept] == 2 and concept in self._binary and self._areas is not None:
            place = self._binary.index(concept)
            self._binary.remove(concept)
            self._areas = self._areas.without(place) if self._binary else None
        if fitted:
            self.fit()

    def decay(self, factor: float) -> None:
        """Let rows of before count for less, in the fit and in the scores."""
        for one in (self.bank, self._hits, self._areas):
            if one is not None:
                one.decay(factor)

    def judge(self, rows: Rows) -> None:
        """Score the held-out rows by the probes as they are now; where there is none, rows say nothing of one."""
        if self.probes is None or not len(rows.parts.judged):
            return
        features, labels, usable = rows.held
        scores = self.probes.scores(features)
        counts = None if usable is None else usable.T[..., None]
        there = self.probes.there
        known = there.sum(-1, keepdim=True)
        probed = known[..., 0] > 1
        if not bool(probed.all()):
            counts = probed.expand(scores.shape[:3]) if counts is None else counts & probed
        of_class = torch.zeros(len(labels), *scores.shape[2:], dtype=torch.bool).scatter_(2, labels[..., None], True)
        right = (scores.argmax(-1) == labels[:, None])[..., None]
        counted = of_class[:, None].expand(scores.shape)
        if counts is not None:
            counted = counted & counts[..., None]
        among = torch.where(there, known, 0).flatten()
        self._hits.add(rows.parts.groups, counted.flatten(1), right.expand(scores.shape).flatten(1), among)
        if self._areas is not None:
            binary = self._binary
            if counts is not None:
                counts = counts.expand(scores.shape[:3])[..., binary]
            margins = (scores[..., 1] - scores[..., 0])[..., binary]
            self._areas.add(
                rows.parts.groups, margins, labels[:, binary] == 1, self.probes.middle[:, binary],
                self.probes.spread[:, binary], counts,
            )  # fmt: skip

    def score(self, source: int, concept: int) -> Interval:
        """The balanced accuracy of one concept."""
        return self._hits.accuracy(self._columns(source, concept), self.confidence)

    def found(self, source: int, concept: int) -> dict[str, Interval]:
        """The scores of one concept: ``"accuracy"`` (balanced), and ``"auc"`` of two classes."""
        enough, found = self._enough(source, concept), {"accuracy": self.score(source, concept)}
        if self._areas is not None and concept in self._binary:
            area = self._areas.area(self._binary.index(concept), self.confidence, source)
            if not bool(enough[:2].all()):  # what is too little for one is too little for the other
                area = none(
                    math.nan, "too few rows of a class", confidence=self.confidence, groups=area.groups, rows=area.rows
                )
            found["auc"] = area
        return found

    def words(self, source: int, concept: int) -> str:
        """Why there is no score, or what was left out of it."""
        there, rows = self.bank.there[source, concept], self._rows(source, concept)
        enough = self._enough(source, concept)
        if int(there.sum()) < 2:
            return "no probe yet: the training rows hold one class or none"
        if not bool((rows > 0).any()):
            return "no held-out row yet: the split has held out no group of these rows"
        few = ((rows > 0) & ~enough).nonzero().squeeze(-1).tolist()
        unseen = ((rows > 0) & ~there).nonzero().squeeze(-1).tolist()
        said = [f"left out, fewer than {self.min_rows:g} held-out rows: class {listed(few, 6)}"] if few else []
        said += [f"wrong, without a training row: class {listed(unseen, 6)}"] if unseen else []
        return "; ".join([*said, *self._hits.words(self._columns(source, concept))])

    def difference(self, source: int, concept: int, other: ScoredClasses, at: tuple[int, int]) -> Interval:
        """The balanced accuracy of a concept minus that of one of another bank, of a source there, by group.

        There is none where that one never learnt a class which is scored here: it guesses among fewer.
        """
        unlearnt = self._enough(source, concept) & ~other.bank.there[at]
        if bool(unlearnt.any()):
            lacking = f"one of the two has no training row of class {listed(unlearnt.nonzero()[:, 0].tolist(), 6)}"
            return none(math.nan, lacking, confidence=self.confidence, groups=0, rows=0.0)
        found = []
        own, theirs = self._hits.columns(self._columns(source, concept)), other._hits.columns(other._columns(*at))
        for mine, its in zip(self._hits.tables, other._hits.tables, strict=True):
            parts = aligned(mine, own, its, theirs)
            if parts is None:
                return none(
                    math.nan, "the two were grouped in other ways", confidence=self.confidence, groups=0, rows=0.0
                )
            counts = [half for part in parts for half in np.split(part, 2, axis=1)]
            found.append(statistics.accuracy_difference(*counts, confidence=self.confidence))
        return widest(found)

    def majority(self, source: int, concept: int) -> float:
        """The share of the most frequent class among the held-out rows."""
        rows = self._rows(source, concept)
        return float(rows.max() / rows.sum()) if float(rows.sum()) else math.nan

    def classes(self, source: int, concept: int) -> int:
        """How many classes are scored."""
        return int(self._enough(source, concept).sum())

    def chance(self, source: int, concept: int) -> float:
        """The balanced accuracy of a guess, on average over the rows where some were judged among fewer classes."""
        return self._hits.chance(self._columns(source, concept))

    def probe(self, source: int, concept: int, path: str, facts: dict[str, float]) -> LinearProbe | None:
        """The probe of one concept."""
        if self.probes is None or int(self.probes.there[source, concept].sum()) < 2:
            return None
        return self.probes.one(source, concept, self.bank.classes[concept], path, facts)

    def _merge_scores(self, other: ScoredClasses) -> None:
        self._hits.merge(other._hits)
        if self._areas is not None and other._areas is not None:
            self._areas.merge(other._areas)

    def _ready(self) -> bool:
        return bool((self.bank.there.sum(-1) > 1).any())

    def _rows(self, source: int, concept: int) -> Tensor:
        start = (source * self.width + concept) * self._most
        return self._hits.rows_of(slice(start, start + self._most))

    def _enough(self, source: int, concept: int) -> Tensor:
        return self._rows(source, concept) > self.min_rows - 1e-6

    def _columns(self, source: int, concept: int) -> Tensor:
        """Which columns hold the classes that are scored."""
        columns = torch.zeros(len(self.bank.shift), self.width, self._most, dtype=torch.bool)
        columns[source, concept] = self._enough(source, concept)
        return columns.flatten()


class ScoredValues(Scored[ValueBank]):
    """Ridge regressions of several numbers, and the shares of variance that they explain.

    Args:
        sources: of how many sources.
        features: the length of a feature vector.
        numbers: how many numbers a row has.
        groupings: how many ways there are to group the rows.
        options: as of :class:`Scored`.
    """

    probes: ValueProbes | None

    def __init__(self, *, sources: int, features: int, numbers: int, groupings: int, **options: Any) -> None:
        super().__init__(**options)
        self.bank = ValueBank(sources=sources, features=features, numbers=numbers)
        self._sums = [Tally(width=4 * sources * numbers) for _ in range(groupings)]
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
        if self.probes is None or not len(rows.parts.judged):
            return
        features, labels, usable = rows.held
        wrong = self.probes.predict(features) - labels[:, None]
        if self._about is None:
            self._about = self.bank.target_shift.clone()
        about = (labels - self._about)[:, None].expand(wrong.shape)
        values = torch.stack([torch.ones_like(about), about, about.square(), wrong.square()], -1)
        ready = self._ready_sources()
        if usable is not None or not bool(ready.all()):
            counted = ready.expand(len(labels), -1) if usable is None else usable.T & ready
            values = torch.where(counted[..., None, None], values, 0.0)
        for tally, groups in zip(self._sums, rows.parts.groups, strict=True):
            tally.add(groups, values.flatten(1))

    def score(self, source: int, concept: int) -> Interval:
        """The share of variance of one number that is explained."""
        columns = self._columns(source, concept)
        return widest([
            statistics.r_squared(tally.of(columns).numpy(), confidence=self.confidence) for tally in self._sums
        ])  # fmt: skip

    def found(self, source: int, concept: int) -> dict[str, Interval]:
        """The score of one number, ``"r2"``."""
        return {"r2": self.score(source, concept)}

    def words(self, source: int, concept: int) -> str:
        """Why there is no score."""
        if not bool(self._ready_sources()[source]):
            return "no probe yet: there are no two training rows"
        if not float(self._sums[0].of(self._columns(source, concept))[:, 0].sum()):
            return "no held-out row yet: the split has held out no group of these rows"
        return ""

    def difference(self, source: int, concept: int, other: ScoredValues, at: tuple[int, int]) -> Interval:
        """The share of variance explained minus that of a number of another bank, of a source there, by group."""
        found = []
        own, theirs = self._columns(source, concept), other._columns(*at)
        for mine, its in zip(self._sums, other._sums, strict=True):
            parts = aligned(mine, own, its, theirs)
            if parts is None:
                return none(
                    math.nan, "the two were grouped in other ways", confidence=self.confidence, groups=0, rows=0.0
                )
            found.append(statistics.r_squared_difference(*parts, confidence=self.confidence))
        return widest(found)

    def classes(self, source: int, concept: int) -> int:
        """One number."""
        return 1

    def majority(self, source: int, concept: int) -> float:
        """What the mean explains."""
        return 0.0

    def chance(self, source: int, concept: int) -> float:
        """What the mean explains."""
        return 0.0

    def probe(self, source: int, concept: int, path: str, facts: dict[str, float]) -> LinearProbe | None:
        """The probe of one number."""
        if self.probes is None or not bool(self._ready_sources()[source]):
            return None
        return self.probes.one(source, concept, path, facts)

    def _merge_scores(self, other: ScoredValues) -> None:
        if other._about is None:
            return
        if self._about is None:
            self._about = other._about
        apart = other._about - self._about
        for tally, its in zip(self._sums, other._sums, strict=True):
            rows, values, squares, errors = its.sums.reshape(-1, len(self.bank.shift), self.width, 4).unbind(-1)
            moved = [rows, values + rows * apart, squares + 2 * apart * values + rows * apart.square(), errors]
            tally.add(its.codes, torch.stack(moved, -1).flatten(1))

    def _ready(self) -> bool:
        return bool(self._ready_sources().any())

    def _ready_sources(self) -> Tensor:
        return self.bank.rows.sum(1) > 1

    def _columns(self, source: int, concept: int) -> slice:
        start = 4 * (source * self.width + concept)
        return slice(start, start + 4)
