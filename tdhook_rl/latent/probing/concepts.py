"""What a probe is asked for: one class of several, yes-or-no labels, or numbers; and how it is fitted and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tdhook_rl import statistics
from tdhook_rl.errors import InputError, listed
from tdhook_rl.latent.probing.class_statistics import ClassStatistics
from tdhook_rl.latent.probing.held_out import HitTally, ScoreHistograms, Tally, widest
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.target_statistics import TargetStatistics
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.differences import mean_r_squared


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How probes are fitted and scored; see :class:`tdhook_rl.rollout.OnlineProbe`."""

    kind: Literal["lda", "ridge"]
    penalty: float | None
    priors: Literal["rows", "equal"]
    min_rows: float
    confidence: float


class Concept:
    """The base: statistics of the training rows, and scores of the held-out rows.

    Attributes:
        statistics: of the training rows.
        words: why a score or an interval cannot be had, and what was left out of it.
    """

    main: str
    statistics: Any

    def __init__(self, options: ProbeOptions) -> None:
        self.options = options
        self.words: list[str] = []

    def checked(self, labels: Tensor) -> Tensor:
        """The labels of usable rows as the statistics take them, or an ``InputError``."""
        raise NotImplementedError

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """Add training rows."""
        self.statistics.add(features, labels)

    def decay(self, factor: float) -> None:
        """Let rows of before count for less, in the fit and in the scores."""
        raise NotImplementedError

    def solve(self, path: str) -> LinearProbe | None:
        """The probe, where the training rows determine one."""
        raise NotImplementedError

    def judge(self, probe: LinearProbe, features: Tensor, labels: Tensor, codes: Sequence[Tensor]) -> None:
        """Score held-out rows."""
        raise NotImplementedError

    def train_score(self, probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
        """Of rows that the probe was fitted on."""
        raise NotImplementedError

    def found(self) -> dict[str, Interval]:
        """The scores of the held-out rows by name, ``main`` first; writes :attr:`words`."""
        raise NotImplementedError

    @property
    def classes(self) -> float:
        """Over how many classes (labels, numbers) the score goes."""
        raise NotImplementedError


class ClassConcept(Concept):
    """One class of several: balanced accuracy, and with two classes the area under the curve."""

    main = "accuracy"

    def __init__(self, options: ProbeOptions, *, features: int, classes: int, groupings: int) -> None:
        super().__init__(options)
        self.statistics = ClassStatistics(features=features, classes=classes)
        self._hits = HitTally(columns=classes, groupings=groupings)
        self._scores = ScoreHistograms(labels=1, groupings=groupings) if classes == 2 else None

    def checked(self, labels: Tensor) -> Tensor:
        return self.statistics.checked_labels(labels)

    def learn(self, features: Tensor, labels: Tensor) -> None:
        before = self.statistics.there
        super().learn(features, labels)
        # While a class had no training row its held-out rows were wrong, whatever can be known of it.
        self._hits.forget(self.statistics.there & ~before)

    def decay(self, factor: float) -> None:
        for one in (self.statistics, self._hits, self._scores):
            if one is not None:
                one.decay(factor)

    def solve(self, path: str) -> LinearProbe | None:
        if int(self.statistics.there.sum()) < 2:
            return None
        options = self.options
        return self.statistics.solve(
            kind=options.kind, penalty=options.penalty, path=path, priors=options.priors, absent="never"
        )

    def judge(self, probe: LinearProbe, features: Tensor, labels: Tensor, codes: Sequence[Tensor]) -> None:
        scores = probe.scores(features.double()).cpu()
        of_class = torch.nn.functional.one_hot(labels, len(self.statistics.count)).bool()
        known = torch.where(self.statistics.there, self.statistics.there.sum(), 0)
        self._hits.add(codes, of_class, (scores.argmax(-1) == labels)[:, None].expand_as(of_class), known)
        if self._scores is not None:
            middle, spread = (torch.tensor([one], dtype=torch.float64) for one in self.statistics.margin(probe))
            margin = scores[:, 1:] - scores[:, :1]
            self._scores.add(codes, margin, labels[:, None] == 1, middle, spread)

    def train_score(self, probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
        return probe.accuracy(features, labels.to(features.device))

    def found(self) -> dict[str, Interval]:
        there, rows = self.statistics.there, self._hits.rows
        enough = self._enough()
        found = {"accuracy": self._hits.accuracy(enough, self.options.confidence)}
        if self._scores is not None:
            found["auc"] = self._scores.area(0, self.options.confidence)
            if not bool(enough.all()):  # what is too little for one is too little for the other
                found["auc"] = statistics.interval.none(
                    math.nan, "too few rows of a class", confidence=self.options.confidence,
                    groups=found["auc"].groups, rows=found["auc"].rows,
                )  # fmt: skip
        few, unseen = (rows > 0) & ~enough, ~there & (rows > 0)
        self.words = []
        if int(there.sum()) < 2:
            self.words.append(f"there is no probe yet: the training rows hold no row of {_names(~there)}")
        elif not bool((rows > 0).any()):
            self.words.append("there is no held-out row yet: the split has held out no group of these rows")
        elif math.isnan(found["accuracy"].estimate):
            lacking = f", {_names(few)} fewer than min_rows={self.options.min_rows:g}" if bool(few.any()) else ""
            self.words.append(f"the held-out rows hold no row of {_names(there & (rows <= 0))}{lacking}")
        elif bool(few.any()):
            self.words.append(f"left out, with fewer than min_rows={self.options.min_rows:g} rows: {_names(few)}")
        if bool(unseen.any()) and not math.isnan(found["accuracy"].estimate):
            self.words.append(f"held-out rows of {_names(unseen)} count as wrong: no training row is of that class")
        if not math.isnan(found["accuracy"].estimate):
            self.words += self._hits.words(enough)
        return found

    @property
    def classes(self) -> float:
        return float(self._enough().sum())

    def _enough(self) -> Tensor:
        return self._hits.rows > self.options.min_rows - 1e-6


class LabelConcept(Concept):
    """Several yes-or-no labels: balanced accuracy and area under the curve of each, and their means."""

    main = "accuracy"

    def __init__(self, options: ProbeOptions, *, features: int, labels: int, groupings: int) -> None:
        super().__init__(options)
        self.statistics = TargetStatistics(features=features, targets=labels, labels=True)
        self._hits = HitTally(columns=2 * labels, groupings=groupings)
        self._scores = ScoreHistograms(labels=labels, groupings=groupings)

    def checked(self, labels: Tensor) -> Tensor:
        return self.statistics.checked_targets(labels)

    def decay(self, factor: float) -> None:
        for one in (self.statistics, self._hits, self._scores):
            one.decay(factor)

    def solve(self, path: str) -> LinearProbe | None:
        if not bool(self._both().any()):
            return None
        options = self.options
        return self.statistics.solve(kind=options.kind, penalty=options.penalty, path=path, priors=options.priors)

    def judge(self, probe: LinearProbe, features: Tensor, labels: Tensor, codes: Sequence[Tensor]) -> None:
        scores = probe.scores(features.double()).cpu()
        yes = labels.bool()
        right = probe.predict(features.double()).cpu().bool() == yes
        # Labels of which the training rows know one side only are not scored.
        known = self._both()
        self._hits.add(codes, torch.cat([~yes & known, yes & known], 1), torch.cat([right, right], 1))
        self._scores.add(codes, scores, yes, *self.statistics.margins(probe), usable=known.expand(len(yes), 1, -1))

    def train_score(self, probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
        right = (probe.predict(features).cpu() == labels).double()
        shares = [
            torch.stack([right[labels[:, one] == side, one].mean() for side in (0, 1)]).mean()
            for one in range(labels.shape[1])
        ]
        return float(torch.stack(shares).nanmean())

    def found(self) -> dict[str, Interval]:
        enough, count = self._enough(), len(self.statistics.of_targets)
        confidence = self.options.confidence
        found = {"accuracy": self._hits.accuracy(torch.cat([enough, enough]), confidence)}
        for one in range(count):
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[one] = enough[one]
            found[f"accuracy.{one}"] = self._hits.accuracy(torch.cat([chosen, chosen]), confidence)
            area = self._scores.area(one, confidence)
            if not bool(enough[one]):
                area = statistics.interval.none(
                    math.nan, "too few rows", confidence=confidence, groups=area.groups, rows=area.rows
                )
            found[f"auc.{one}"] = area
        self.words = []
        if not bool(self._both().any()):
            self.words.append("there is no probe yet: the training rows hold one class only of every label")
        elif not bool((self._hits.rows > 0).any()):
            self.words.append("there is no held-out row yet: the split has held out no group of these rows")
        elif not bool(enough.all()):
            self.words.append(
                f"labels without min_rows={self.options.min_rows:g} held-out rows of each class are not scored: "
                f"{_names(~enough, 'label')}"
            )
        return found

    @property
    def classes(self) -> float:
        return float(self._enough().sum())

    def _both(self) -> Tensor:
        share = self.statistics.positives / self.statistics.rows.clamp_min(1e-300)
        return (share > 1e-9) & (share < 1 - 1e-9)

    def _enough(self) -> Tensor:
        return (self._hits.rows.reshape(2, -1) > self.options.min_rows - 1e-6).all(0)


class ValueConcept(Concept):
    """Numbers: the share of their variance that the probe explains."""

    main = "r2"

    def __init__(self, options: ProbeOptions, *, features: int, values: int, groupings: int) -> None:
        super().__init__(options)
        self.statistics = TargetStatistics(features=features, targets=values)
        self._sums = [Tally(width=4 * values) for _ in range(groupings)]

    def checked(self, labels: Tensor) -> Tensor:
        return self.statistics.checked_targets(labels)

    def decay(self, factor: float) -> None:
        for one in (self.statistics, *self._sums):
            one.decay(factor)

    def solve(self, path: str) -> LinearProbe | None:
        if self.statistics.rows <= 1:
            return None
        return self.statistics.solve(kind="ridge", penalty=self.options.penalty, path=path)

    def judge(self, probe: LinearProbe, features: Tensor, labels: Tensor, codes: Sequence[Tensor]) -> None:
        wrong = probe.predict(features.double()).cpu() - labels
        about = labels - self.statistics.target_shift
        values = torch.stack([torch.ones_like(about), about, about.square(), wrong.square()], -1).flatten(1)
        for tally, code in zip(self._sums, codes, strict=True):
            tally.add(code, values)

    def train_score(self, probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
        wrong = (probe.predict(features.double()).cpu() - labels).square().sum(0)
        return float((1 - wrong / (labels - labels.mean(0)).square().sum(0)).mean())

    def found(self) -> dict[str, Interval]:
        count = len(self.statistics.of_targets)
        sums, confidence = [tally.sums.reshape(-1, count, 4).numpy() for tally in self._sums], self.options.confidence
        each = [
            widest([statistics.r_squared(part[:, one], confidence=confidence) for part in sums]) for one in range(count)
        ]
        self.words = [f"r2: {each[0].words}"] if math.isnan(each[0].estimate) else []
        if self.statistics.rows <= 1:
            self.words = ["there is no probe yet: there are no two training rows"]
        elif each[0].rows == 0:
            self.words = ["there is no held-out row yet: the split has held out no group of these rows"]
        if count == 1:
            return {"r2": each[0]}
        whole = widest([mean_r_squared(part, confidence=confidence) for part in sums])
        return {"r2": whole} | {f"r2.{index}": one for index, one in enumerate(each)}

    @property
    def classes(self) -> float:
        return float(len(self.statistics.of_targets))


def concept_of(
    labels: Tensor, batch: Sequence[int], options: ProbeOptions, *, features: int, classes: int, groupings: int
) -> Concept:
    """The concept that labels of this shape and dtype are.

    Raises:
        InputError: for labels of another shape, or numbers with ``kind="lda"``.
    """
    single = labels.shape in (torch.Size(batch), torch.Size((*batch, 1)))
    if labels.ndim > len(batch) + 1 or labels.shape[: len(batch)] != torch.Size(batch):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(batch)}, or one dimension more for several "
            "labels or numbers of a row"
        )
    width = 1 if single else labels.shape[-1]
    if labels.is_floating_point():
        if options.kind != "ridge":
            raise InputError(
                f"labels are {labels.dtype}: numbers need kind='ridge' (scored by r2), class numbers are integers "
                "(labels.long())"
            )
        return ValueConcept(options, features=features, values=width, groupings=groupings)
    if single:
        return ClassConcept(options, features=features, classes=classes, groupings=groupings)
    return LabelConcept(options, features=features, labels=width, groupings=groupings)


def _names(chosen: Tensor, what: str = "class") -> str:
    return f"{what} {listed(chosen.nonzero()[:, 0].tolist(), 6) or 'none'}"
