"""What a sweep found: every outcome of every episode, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import ArtifactError, InputError, nearest
from tdhook_rl.statistics import (
    Interval,
    grouped_mean,
    holm,
    iqm,
    p_value,
    paired_difference,
    ratio_of_means,
    unpaired_difference,
)
from tdhook_rl.statistics.cautions import all_alike
from tdhook_rl.statistics.interval import pair_up
from tdhook_rl.statistics.means import may_be_0
from tdhook_rl.sweeps.conditions import BASELINE, RANDOM, REPEATED, SHUFFLED, Condition, place_of
from tdhook_rl.sweeps.outcomes import table_of
from tdhook_rl.sweeps.sweep_file import FILE, UNFINISHED, read_sweep, write_sweep
from tdhook_rl.sweeps.sweep_table import SweepRow, SweepTable


@dataclass(frozen=True, kw_only=True, repr=False)
class SweepResult:
    """Outcomes by condition and episode.

    Args:
        conditions: what was played.
        values: of each outcome ``(conditions, episodes)``, kept in float64.
        facts: what was asked, and how it was played.
        runs: the training run of each episode, where results of several agents are together; intervals are over
            runs then.

    Example:
        >>> conditions = [Condition(), Condition(draw=1), Condition("up", 1.0), Condition("up", 1.0, "random", 0)]
        >>> won = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).double()
        >>> found = SweepResult(conditions=conditions, values={"won": won})
        >>> found
        SweepResult('won' by 'up', 4 conditions x 4 episodes: .table() has the effects)
        >>> found.effect("won").estimate, found.paired, found.control_effects("won").tolist()
        (0.75, True, [0.0])
    """

    conditions: Sequence[Condition]
    values: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    runs: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", table_of(self.values, len(self.conditions), self.runs))

    def __repr__(self) -> str:
        outcomes, vectors = (", ".join(map(repr, names)) for names in (self.outcomes, self.vectors))
        sizes = next((one.shape for one in self.values.values()), (0, 0))
        played = f"{sizes[0]} conditions x {sizes[1]} episodes"
        return f"SweepResult({outcomes} by {vectors}, {played}: .table() has the effects)"

    @classmethod
    def together(cls, results: Sequence[SweepResult]) -> SweepResult:
        """The same sweep of several training runs: intervals are over runs, from the second on. Facts are those of all.

        What is together already adds all of its runs.

        Raises:
            InputError: for none, or sweeps of other conditions or outcomes.
        """
        if not results:
            raise InputError("together() takes results of at least one sweep")
        first = results[0]
        for one in results:
            if list(one.conditions) != list(first.conditions) or one.outcomes != first.outcomes:
                raise InputError("the sweeps differ in their conditions or outcomes: play all with the same arguments")
        values = {name: torch.cat([one.values[name] for one in results], 1) for name in first.outcomes}
        counts = torch.tensor([next(iter(one.values.values())).shape[1] for one in results])
        none = [torch.zeros(count, dtype=torch.long) for count in counts.tolist()]
        own = [
            zero if one.runs is None else one.runs.unique(return_inverse=True)[1]
            for one, zero in zip(results, none, strict=True)
        ]
        before = np.cumsum([0, *(int(runs.max()) + 1 for runs in own)]).tolist()
        together = torch.cat([runs + start for runs, start in zip(own, before, strict=False)])
        facts = {
            name: fact for name, fact in first.facts.items() if all(one.facts.get(name) == fact for one in results)
        }
        if any("unfinished" in one.facts for one in results):
            cut = [float(one.facts.get("unfinished", 0.0)) for one in results]
            facts["unfinished"] = float(np.average(cut, weights=counts))
        return cls(conditions=first.conditions, values=values, facts=facts, runs=together)

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> SweepResult:
        """What :func:`steering_sweep` has kept in a folder.

        Raises:
            ArtifactError: if there is none, it is damaged, or conditions are missing: the call goes on with these.
        """
        conditions, values, facts, done, runs = read_sweep(Path(folder) / FILE)
        if not bool(done.all()):
            raise ArtifactError(
                f"the sweep in {folder} is at {int(done.sum())} of {len(done)} conditions: the same call of "
                "steering_sweep goes on from there"
            )
        cut = values.pop(UNFINISHED, None)
        facts |= {} if cut is None else {"unfinished": float(cut.mean())}
        return cls(conditions=conditions, values=values, facts=facts, runs=runs)

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write it, as safetensors and JSON, into a folder."""
        done = torch.ones(len(self.conditions), dtype=torch.bool)
        return write_sweep(Path(folder) / FILE, self.conditions, self.values, self.facts, done, self.runs)

    # ------------------------------------------------------------- what there is

    @property
    def vectors(self) -> list[str]:
        """The names of the vectors."""
        return list(dict.fromkeys(one.vector for one in self.conditions if one.vector))

    @property
    def outcomes(self) -> list[str]:
        """The names of the outcomes."""
        return list(self.values)

    @property
    def paired(self) -> bool:
        """Whether alpha 0 gave the same twice, so that conditions can be compared episode by episode."""
        first, again = (self._row(one) for one in (BASELINE, REPEATED))
        return all(torch.equal(values[first], values[again]) for values in self.values.values())

    def alphas(self, vector: str | None = None) -> list[float]:
        """The strengths of a vector, 0 included, in order."""
        name = self._vector(vector)
        return sorted({0.0, *(one.alpha for one in self.conditions if one.vector == name and not one.control)})

    def draws(self, vector: str | None = None, control: str = RANDOM) -> int:
        """How many controls of a kind a vector has."""
        name = self._vector(vector)
        return len({one.draw for one in self.conditions if one.vector == name and one.control == control})

    def of(
        self, outcome: str, vector: str | None = None, alpha: float = 0.0, *, control: str = "", draw: int = 0
    ) -> Tensor:
        """One condition's outcome of each episode, ``(episodes,)``.

        Raises:
            InputError: for an outcome, vector, strength or control that was not played.
        """
        if outcome not in self.values:
            raise InputError(f"there is no outcome {outcome!r}; {nearest(outcome, self.values)}")
        if alpha == 0:
            return self.values[outcome][self._row(BASELINE)]
        return self.values[outcome][self._row(Condition(self._vector(vector), float(alpha), control, draw))]

    # --------------------------------------------------------------- estimates

    def response(self, outcome: str, vector: str | None = None) -> list[Interval]:
        """The mean at each of :meth:`alphas`."""
        return [self.mean(outcome, vector, alpha) for alpha in self.alphas(vector)]

    def mean(self, outcome: str, vector: str | None = None, alpha: float = 0.0) -> Interval:
        """The mean over episodes."""
        values = self.of(outcome, vector, alpha)
        return grouped_mean(values, self._groups(), bounds=self._bounds(outcome))

    def iqm(self, outcome: str, vector: str | None = None, alpha: float = 0.0) -> Interval:
        """The interquartile mean, of episodes or of runs (Agarwal et al. 2021)."""
        return iqm(self.of(outcome, vector, alpha), self._groups())

    def effect(self, outcome: str, vector: str | None = None, alpha: float | None = None) -> Interval:
        """The mean change against alpha 0: of the same episodes where they are paired."""
        values, base = self.of(outcome, vector, self._strength(vector, alpha)), self.of(outcome)
        if not self.paired and self._groups() is None:
            return unpaired_difference(base, values)
        change, groups = values - base, self._groups()
        shares = self._bounds(outcome) is not None
        # Where all change alike, their spread says nothing; that they are shares does.
        alike = shares and bool((change == change[0]).all())
        options = {"bounds": (-1.0, 1.0)} if alike else {"method": "t"} if shares else {}
        found = paired_difference(base, values, groups, **options)
        if shares and found.known:
            found = replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))
        return replace(found, p=p_value(change, groups))

    def control_effects(
        self, outcome: str, vector: str | None = None, alpha: float | None = None, control: str = RANDOM
    ) -> Tensor:
        """The change under each control, ``(draws,)``."""
        alpha, base = self._strength(vector, alpha), self.of(outcome).mean()
        draws = range(self.draws(vector, control))
        found = [self.of(outcome, vector, alpha, control=control, draw=draw).mean() - base for draw in draws]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)

    def control_response(self, outcome: str, vector: str | None = None, control: str = RANDOM) -> Tensor:
        """The mean under each control at each of :meth:`alphas`, ``(draws, alphas)``."""
        base, alphas = self.of(outcome).mean(), self.alphas(vector)
        columns = [self.control_effects(outcome, vector, alpha, control) + base if alpha else
                   base.expand(self.draws(vector, control)) for alpha in alphas]  # fmt: skip
        return torch.stack(columns, 1)

    def specificity(self, outcome: str, vector: str | None = None, alpha: float | None = None) -> Interval | None:
        """The effect over the size of the largest effect of a control; ``None`` without controls.

        Its interval takes the control that did most as given. Of several the largest is so by chance in part: where
        all of what it does may be chance (Bonferroni), the words say so.
        """
        alpha, base = self._strength(vector, alpha), self.of(outcome)
        rivals = [
            self.of(outcome, vector, alpha, control=kind, draw=draw) - base
            for kind in (RANDOM, SHUFFLED)
            for draw in range(self.draws(vector, kind))
        ]
        if not rivals:
            return None
        largest = max(rivals, key=lambda one: abs(float(one.mean())))
        change, groups = self.of(outcome, vector, alpha) - base, self._groups()
        found = ratio_of_means(change, largest * (1.0 if float(largest.mean()) >= 0 else -1.0), groups)
        if found.known and 0.0 in grouped_mean(largest, groups, confidence=1 - 0.05 / len(rivals), method="t"):
            chance = (
                f"the largest of {len(rivals)} controls may be so by chance: specificity and limits are rather too low"
            )
            found = replace(found, words="; ".join(filter(None, (found.words, chance))))
        return found

    def alpha_50(self, outcome: str, vector: str | None = None) -> Interval:
        """The strength at which half of the effect at the largest is reached, on straight lines from 0 up to it.

        Strengths below 0 say nothing of it. The interval holds the strengths whose mean is not told apart from the half
        way (Fieller 1954). Of one strength above 0 there is none: half of a straight line is reached in its middle,
        whatever was played.

        Raises:
            InputError: if no strength is above 0.
        """
        alphas = [alpha for alpha in self.alphas(vector) if alpha >= 0]
        if len(alphas) < 2:
            raise InputError("alpha_50 needs strengths above 0")
        curves = torch.stack([self.of(outcome, vector, alpha) for alpha in alphas])
        ahead = curves - (curves[0] + curves[-1]) / 2
        toward = math.copysign(1.0, float((curves[-1] - curves[0]).mean()))
        grid = np.linspace(alphas[0], alphas[-1], 401)
        means = np.interp(grid, alphas, toward * ahead.mean(1).numpy())
        crossing = int(np.argmax(means >= 0))
        numbers = pair_up(curves.shape[1], self._groups())
        sums = np.stack([np.bincount(numbers, one) for one in ahead.numpy()])
        between = np.stack([np.interp(grid, alphas, one) for one in sums.T], 1)  # the straight lines of each group
        near = [float(alpha) for alpha in grid[may_be_0(between, np.bincount(numbers))]]
        shape = {"confidence": 0.95, "groups": self._count(), "rows": float(curves.shape[1])}
        ends = not near or near[0] <= alphas[0] or near[-1] >= alphas[-1]
        alone = len(alphas) == 2
        if alone or ends or self.effect(outcome, vector, alphas[-1]).p > 0.05:
            words = "the effect is too small, or too few episodes tell where half of it is reached"
            words = "with one strength above 0 a straight line reaches half of it in the middle" if alone else words
            return Interval(
                estimate=float(grid[crossing]), low=math.nan, high=math.nan, method="none", words=words, **shape
            )
        words = all_alike(self._count(), 0.95) if near[0] == near[-1] else ""
        found = {"estimate": float(grid[crossing]), "low": near[0], "high": near[-1], "method": "inverted t test"}
        return Interval(**found, words=words, **shape)

    def p(self, outcome: str, vector: str | None = None, alpha: float | None = None) -> float:
        """The p-value that it does something, and more than a random direction of equal norm.

        The larger of two: of the change against alpha 0 by episode, and of a control doing as much, by the t
        distribution of what one more control would do. With fewer than two controls, or such as all do the same, it is
        the first alone.
        """
        from scipy import stats

        found = [self.effect(outcome, vector, alpha).p]
        others = self.control_effects(outcome, vector, alpha)
        if len(others) > 1 and float(others.std()) > 0:
            change = float(self.effect(outcome, vector, alpha).estimate)
            away = abs(change - float(others.mean())) / (float(others.std()) * math.sqrt(1 + 1 / len(others)))
            found.append(float(2 * stats.t.sf(away, len(others) - 1)))
        return max(found, key=lambda one: math.inf if math.isnan(one) else one)

    def chosen(self, outcome: str, *, larger: bool = True) -> SweepRow:
        """The vector and strength that do most in one half of the episodes, and what they do in the other half.

        Args:
            outcome: what is to change.
            larger: whether it is to become larger.

        Raises:
            InputError: of a single episode.
        """
        if len(self.of(outcome)) < 2:
            raise InputError("one half of the episodes chooses and the other reports, and the sweep has one: play more")
        halves = [torch.arange(len(self.of(outcome))) % 2 == half for half in (0, 1)]
        first, second = (self._part(half) for half in halves)
        asked = [(vector, alpha) for vector in self.vectors for alpha in self.alphas(vector) if alpha]
        best = max(asked, key=lambda one: float(first.effect(outcome, *one)) * (1 if larger else -1))
        return second.row(outcome, *best)

    # ------------------------------------------------------------------- tables

    def row(self, outcome: str, vector: str | None = None, alpha: float | None = None) -> SweepRow:
        """All that is known of one vector at one strength."""
        name, strength = self._vector(vector), self._strength(vector, alpha)
        return SweepRow(
            vector=name,
            alpha=strength,
            outcome=outcome,
            mean=self.mean(outcome, name, strength),
            baseline=self.mean(outcome),
            effect=self.effect(outcome, name, strength),
            random=self.control_effects(outcome, name, strength),
            shuffled=self.control_effects(outcome, name, strength, SHUFFLED),
            specificity=self.specificity(outcome, name, strength),
            p=self.p(outcome, name, strength),
        )

    def table(self, *outcomes: str) -> SweepTable:
        """A row for each vector, strength and outcome; p-values adjusted over all of an outcome (Holm 1979)."""
        found: list[SweepRow] = []
        for outcome in outcomes or self.outcomes:
            rows = [self.row(outcome, name, alpha) for name in self.vectors for alpha in self.alphas(name) if alpha]
            adjusted = holm([one.p for one in rows])
            found += [replace(one, adjusted=float(p)) for one, p in zip(rows, adjusted, strict=True)]
        return SweepTable(found)

    def records(self) -> list[dict[str, Any]]:
        """The records of :meth:`table`."""
        return self.table().records()

    def frame(self) -> Any:
        """A pandas DataFrame of :meth:`table`."""
        return self.table().frame()

    def episodes(self) -> list[dict[str, Any]]:
        """A record for each condition and episode, with all outcomes."""
        runs = self._groups()
        found = []
        for place, one in enumerate(self.conditions):
            kind = one.control or ("vector" if one.vector else "none")
            for episode in range(next(iter(self.values.values())).shape[1]):
                record = {
                    "vector": one.vector,
                    "alpha": one.alpha,
                    "control": kind,
                    "draw": one.draw,
                    "episode": episode,
                }
                record |= {} if runs is None else {"run": int(runs[episode])}
                found.append(record | {name: float(values[place, episode]) for name, values in self.values.items()})
        return found

    # -------------------------------------------------------------------- inside

    def _part(self, episodes: Tensor) -> SweepResult:
        runs = None if self.runs is None else self.runs[episodes]
        values = {name: found[:, episodes] for name, found in self.values.items()}
        return SweepResult(conditions=self.conditions, values=values, facts=self.facts, runs=runs)

    def _groups(self) -> Tensor | None:
        return None if self.runs is None or len(self.runs.unique()) < 2 else self.runs

    def _count(self) -> int:
        groups = self._groups()
        return next(iter(self.values.values())).shape[1] if groups is None else len(groups.unique())

    def _bounds(self, outcome: str) -> tuple[float, float] | None:
        values = self.values[outcome]
        return (0.0, 1.0) if bool(((values == 0) | (values == 1)).all()) else None

    def _row(self, condition: Condition) -> int:
        if (place := place_of(condition, self.conditions)) is not None:
            return place
        named = f"{condition.control or 'vector'} {condition.vector!r} at alpha {condition.alpha:g}"
        have = ", ".join(f"{alpha:g}" for alpha in self.alphas(condition.vector))
        raise InputError(f"the sweep did not play {named} (draw {condition.draw}); strengths: {have}")

    def _vector(self, vector: str | None) -> str:
        names = self.vectors
        if vector is None and len(names) == 1:
            return names[0]
        if vector in names:
            return str(vector)
        if vector is None:
            raise InputError(f"the sweep has several vectors, say which: {', '.join(names)}")
        raise InputError(f"there is no vector {vector!r}; {nearest(vector, names)}")

    def _strength(self, vector: str | None, alpha: float | None) -> float:
        """The strength that is asked for; the largest in size unless one is."""
        return max(self.alphas(vector), key=lambda one: (abs(one), one)) if alpha is None else float(alpha)
