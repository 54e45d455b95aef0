"""One figure of a benchmark: what it took beside what it is compared with, and the budget of that ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.pairs import Median

__all__ = ["Budget", "Figure", "figures_of", "header"]


@dataclass(frozen=True)
class Budget:
    """What a ratio ``ours / against`` is held to.

    Attributes:
        against: the contender that ours is compared with.
        most: what the ratio may be at most; ``None`` where it is only told.
        note: why, where a budget is not what was asked for.
    """

    against: str
    most: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One ratio, ready for a table or for JSON.

    Attributes:
        what: the method or the kind of work.
        case: the net and the batch.
        ours, against: the contenders.
        milliseconds: of ours and of the other, medians of the rounds.
        ratio: ours over the other's, round by round: its median and 95 % interval.
        most: the budget, ``None`` where there is none.
        met: whether the median keeps it.
        pairs: how many rounds.
        note: what is to be said of it.
    """

    what: str
    case: str
    ours: str
    against: str
    milliseconds: tuple[float, float]
    ratio: Median
    most: float | None
    pairs: int
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.most is None else self.ratio.median <= self.most

    def as_dict(self) -> dict[str, Any]:
        """The figure as numbers and words, for JSON."""
        return asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        ratio = f"{self.ratio.median:6.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}]"
        budget = "" if self.most is None else f"at most {self.most:g}: {'met' if self.met else 'MISSED'}"
        ours, other = (f"{one:9.3f}" for one in self.milliseconds)
        line = f"{self.what:12}{self.case:20}{self.ours:14}{ours}  {self.against:24}{other}  {ratio:22}{budget}"
        return f"{line}  ({self.note})" if self.note else line


def header() -> str:
    return f"{'what':12}{'case':20}{'ours':14}{'ms':>9}  {'against':24}{'ms':>9}  {'ratio':22}budget"


def figures_of(
    what: str, case: str, ours: str, seconds: Mapping[str, np.ndarray], budgets: Sequence[Budget]
) -> list[Figure]:
    """The figures of one measurement; contenders that did not take part have none."""
    found = []
    for budget in budgets:
        if budget.against in seconds:
            mine, other = seconds[ours], seconds[budget.against]
            spent = float(np.median(mine)) * 1e3, float(np.median(other)) * 1e3
            ratio = Median.of(mine / other)
            kind = what, case, ours, budget.against
            found.append(Figure(*kind, spent, ratio, budget.most, len(mine), budget.note))
    return found
