"""One figure of a benchmark: what it took beside what it is compared with, and the budget of that ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.pairs import Median

__all__ = ["PEERS", "Budget", "Figure", "digits", "figures_of", "header", "show"]

#: Packages that are compared with; what is named otherwise is written by hand, or the same without what is measured.
PEERS = ("captum", "tdhook", "nnsight", "zennit", "scikit-learn")


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
        medians: of ours and of the other, over the rounds, in ``unit``.
        quartiles: the first and third of both.
        ratio: ours over the other's, round by round: its median and 95 % interval.
        most: the budget, ``None`` where there is none.
        met: whether the median keeps it.
        pairs: how many rounds.
        note: what is to be said of it.
        unit: of medians and quartiles.
    """

    what: str
    case: str
    ours: str
    against: str
    medians: tuple[float, float]
    quartiles: tuple[tuple[float, float], tuple[float, float]]
    ratio: Median
    most: float | None
    pairs: int
    note: str = ""
    unit: str = "ms"

    @property
    def met(self) -> bool | None:
        return None if self.most is None else self.ratio.median <= self.most

    @property
    def peer(self) -> str | None:
        """The package that it is compared with."""
        return next((peer for peer in PEERS if self.against.startswith(peer)), None)

    def as_dict(self) -> dict[str, Any]:
        """The figure as numbers and words, for JSON."""
        return asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        ratio = f"{digits(self.ratio.median):>6} [{digits(self.ratio.low)}, {digits(self.ratio.high)}]"
        budget = "" if self.most is None else f"at most {self.most:.4g}: {'met' if self.met else 'MISSED'}"
        ours, other = (f"{one:10.4g}" for one in self.medians)
        line = (
            f"{self.what:22} {self.case:28} {self.ours:18}{ours}  {self.against:26}{other} {self.unit:4}"
            f"{ratio:24}{budget}"
        )
        return f"{line}  ({self.note})" if self.note else line.rstrip()


def digits(value: float) -> str:
    """Three digits, and per mille near one."""
    return f"{value:.3f}" if 0.9 < value < 1.1 else f"{value:.3g}"


def header() -> str:
    return f"{'what':22} {'case':28} {'ours':18}{'':10}  {'against':26}{'':15}{'ours / against':24}budget"


def show(figures: Iterable[Figure]) -> list[Figure]:
    """Print figures as they come; those that came."""
    print(header())
    found = []
    for figure in figures:
        print(figure, flush=True)
        found.append(figure)
    return found


def figures_of(
    what: str,
    case: str,
    ours: str,
    values: Mapping[str, np.ndarray],
    budgets: Sequence[Budget],
    unit: str = "ms",
) -> list[Figure]:
    """The figures of one measurement; contenders that did not take part have none.

    Args:
        what, case, ours: as of a :class:`Figure`.
        values: of each contender one entry a round: seconds, or in ``unit`` if that is not ``"ms"``.
        budgets: whom ours is compared with.
        unit: of what is told.
    """
    scale = 1e3 if unit == "ms" else 1.0
    found = []
    for budget in budgets:
        if budget.against in values:
            both = values[ours], values[budget.against]
            medians = tuple(float(np.median(one)) * scale for one in both)
            quartiles = tuple(tuple(float(end) * scale for end in np.quantile(one, (0.25, 0.75))) for one in both)
            ratio = Median.of(both[0] / both[1])
            kind = what, case, ours, budget.against
            found.append(Figure(*kind, medians, quartiles, ratio, budget.most, len(both[0]), budget.note, unit))
    return found
