"""The scores of probes, site by concept, each beside what it has to be compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tdhook_rl.errors import InputError, nearest
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cells import Cells, only, shown, words_of

#: The scores of a cell that are intervals, in the order of the table.
SCORES = ("trained", "untrained", "input", "shuffled", "gain", "selectivity", "auc")


@dataclass(frozen=True, kw_only=True)
class ProbeCell:
    """One concept at one site.

    Args:
        site: the path of the module.
        concept: its name.
        score: ``"accuracy"`` (balanced) or ``"r2"``.
        trained: of the network's activation.
        untrained: of the same activation in the untrained network.
        input: of the raw observation.
        shuffled: of labels that were dealt out to groups by chance, from the network's activation.
        gain: trained minus untrained, by group.
        selectivity: trained minus shuffled, by group (Hewitt & Liang 2019).
        auc: the area under the curve, of two classes.
        chance: the score of a guess.
        majority: the share of the most frequent class among the held-out rows.
        classes: how many classes were scored.
        penalty: what the probe was fitted with.
        left_out: rows whose future never came, or that were not finite.
        words: why there is no score or interval, or what was left out of it.
        checkpoint: the name of the weights, where there are several.
        adjusted: the p-value that it is better than the untrained network and than shuffled labels, one-sided,
            adjusted over all cells (Benjamini & Hochberg 1995).
    """

    site: str
    concept: str
    score: str
    trained: Interval
    untrained: Interval | None = None
    input: Interval | None = None
    shuffled: Interval | None = None
    gain: Interval | None = None
    selectivity: Interval | None = None
    auc: Interval | None = None
    chance: float = math.nan
    majority: float = math.nan
    classes: int = 0
    penalty: float = math.nan
    left_out: int = 0
    words: str = ""
    checkpoint: str = ""
    adjusted: float = math.nan

    @property
    def p(self) -> float:
        """The p-value that it is better than its controls, one-sided: the largest of those there are."""
        found = [one for one in (self.gain, self.selectivity) if one is not None]
        sided = [one.p / 2 if one.estimate > 0 else 1 - one.p / 2 for one in found]
        return max(sided, default=math.nan, key=lambda one: math.inf if math.isnan(one) else one)

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words; intervals with their limits."""
        found: dict[str, Any] = {"checkpoint": self.checkpoint} if self.checkpoint else {}
        found |= {"site": self.site, "concept": self.concept, "score": self.score}
        for name in SCORES:
            one = getattr(self, name)
            if one is not None:
                found |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
        found |= {name: getattr(self, name) for name in ("chance", "majority", "classes", "penalty", "left_out")}
        if not math.isnan(self.adjusted):
            found["adjusted"] = self.adjusted
        return found | {"groups": self.trained.groups, "rows": self.trained.rows, "words": words_of(self)}


class ProbeTable(Cells[ProbeCell]):
    """Cells, one for each site and concept.

    Args:
        cells: the cells.

    Example:
        >>> one = Interval(estimate=0.9, low=0.8, high=0.95, confidence=0.95, method="t", groups=20, rows=400)
        >>> table = ProbeTable([ProbeCell(site="fc2", concept="door", score="accuracy", trained=one, chance=0.5)])
        >>> table["fc2", "door"].trained.estimate, len(table)
        (0.9, 1)
    """

    def __getitem__(self, key: Any) -> Any:
        """The cell of ``(site, concept)``, or ``(checkpoint, site, concept)``; or cells by number.

        Raises:
            InputError: for a site and concept that are not in the table, or are there for several checkpoints.
        """
        if not isinstance(key, tuple):
            return super().__getitem__(key)
        found = [cell for cell in self._cells if (cell.checkpoint, cell.site, cell.concept)[-len(key) :] == key]
        cell = only(found, key, [(one.checkpoint, one.site, one.concept) for one in found])
        if cell is not None:
            return cell
        known = [", ".join((cell.checkpoint, cell.site, cell.concept)[-len(key) :]) for cell in self._cells]
        raise InputError(f"the table has no cell {key!r}; {nearest(', '.join(map(str, key)), known)}")

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown."""
        present = [name for name in SCORES if any(getattr(cell, name) is not None for cell in self._cells)]
        several = any(cell.checkpoint for cell in self._cells)
        marked = any(not math.isnan(cell.adjusted) for cell in self._cells)
        heads = ["site", "concept", "score", *present, "chance", "majority", "groups", "rows", "words"]
        heads = ["checkpoint"] * several + heads[:3] + ["adjusted p"] * marked + heads[3:]
        rows = []
        for cell in self._cells:
            scores = [shown(getattr(cell, name)) for name in present]
            counts = [f"{cell.trained.groups}", f"{cell.trained.rows:.0f}"]
            told = [cell.words, cell.trained.words]
            if not math.isnan(cell.trained.estimate):  # why a control has no score, where the probe has one
                told += [one.words for name in present if math.isnan(float(one := getattr(cell, name) or cell.trained))]
            words = "; ".join(dict.fromkeys(one for one in told if one))
            shares = [f"{cell.chance:.2f}", f"{cell.majority:.2f}"]
            mark = [f"{cell.adjusted:.2g}"] * marked
            names = [cell.checkpoint] * several + [cell.site, cell.concept, cell.score]
            rows.append([*names, *mark, *scores, *shares, *counts, words])
        return heads, rows
