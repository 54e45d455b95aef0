"""A table of probes as figures and as a page: what can be read where, and what of it was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdhook_rl.probes.probe_table import ProbeCell, ProbeTable
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import value_grid
from tdhook_rl.report.page import Cautions, Finding, Findings, Page, Table

#: What is marked: adjusted p-values up to this.
LEVEL = 0.05
_MOST = 12


def probe_grids(table: ProbeTable, *, level: float = LEVEL) -> list[Drawing]:
    """Heatmaps of a table: sites by concepts, or, of several checkpoints, for each concept sites by checkpoints.

    The colour is the score of the trained network minus that of the untrained one, where there is one; what is better
    than its controls, p-values adjusted over all cells, is marked.

    Args:
        table: of :func:`tdhook_rl.replay.probe_grid` or :meth:`tdhook_rl.rollout.ProbeSuite.table`.
        level: of the marks.

    Example:
        >>> from tdhook_rl.statistics import Interval
        >>> one = Interval(estimate=0.9, low=0.8, high=0.95, confidence=0.95, method="t", groups=20, rows=400)
        >>> cell = ProbeCell(site="fc2", concept="door", score="accuracy", trained=one, chance=0.5)
        >>> probe_grids(ProbeTable([cell]))[0].alt
        'held-out accuracy minus chance: 0.4 at fc2, door.'
    """
    drawings = []
    for score in dict.fromkeys(cell.score for cell in table):
        cells = [cell for cell in table if cell.score == score]
        controlled = all(cell.gain is not None for cell in cells)
        name = "R²" if score == "r2" else score
        unit = f"{name}, trained minus untrained" if controlled else f"held-out {name} minus chance"
        checkpoints = list(dict.fromkeys(cell.checkpoint for cell in cells))
        by: dict[str, list[ProbeCell]] = {"": cells}
        if len(checkpoints) > 1:
            by = {}
            for cell in cells:
                by.setdefault(cell.concept, []).append(cell)
        # One scale for all, so that what is faint beside another is faint.
        scale = max((abs(value) for cell in cells if math.isfinite(value := _gain(cell))), default=0.0) or None
        for concept, chosen in by.items():
            what = "Which numbers" if score == "r2" else "Which concepts"
            marked = [
                (cell.site, cell.checkpoint if concept else cell.concept) for cell in chosen if cell.adjusted <= level
            ]
            drawing = value_grid(
                _rows(chosen, controlled, bool(concept)), unit=unit, scale=scale, marked=marked,
                title=f"When {concept} can be read" if concept else f"{what} can be read where",
                caption=_caption(chosen, level),
            )  # fmt: skip
            drawings.append(drawing)
    return drawings


def probe_page(
    table: ProbeTable, *, title: str = "What the network knows", command: str = "", beside: Sequence[Drawing] = ()
) -> Page:
    """A page of a table: each concept where it is read best, with its controls; heatmaps; every cell.

    Args:
        table: as of :func:`probe_grids`.
        title: of the page.
        command: what makes it again.
        beside: drawings that come after those of the table.
    """
    marked = [cell for cell in table if cell.adjusted <= LEVEL]
    concepts = list(dict.fromkeys(cell.concept for cell in table))
    best = [max((cell for cell in table if cell.concept == name), key=_gain) for name in concepts]
    found = [_finding(cell) for cell in sorted(best, key=lambda cell: -_gain(cell))[:_MOST]]
    sites = len({cell.site for cell in table})
    lead = (
        f"{len(concepts)} concepts at {sites} sites: {len(marked)} of {len(table)} cells are read better than from an "
        f"untrained network and than labels dealt out by chance (adjusted p at most {LEVEL:g})."
    )
    heads, rows = _cells(table)
    words = dict.fromkeys(
        f"{cell.site}, {cell.concept}: {text}" for cell in table for text in (cell.words, cell.trained.words) if text
    )
    lost = {cell.concept: cell.left_out for cell in table if cell.left_out}
    lines = [
        *words,
        *(f"{name}: {count:,} rows without a label or not finite were left out" for name, count in lost.items()),
    ]
    parts: list[Any] = [Findings(found, text="Scores are of held-out groups; intervals are over groups, 95%.")]
    if lines:
        parts.append(Cautions(lines[:40] + ([f"and {len(lines) - 40} more"] if len(lines) > 40 else [])))
    parts += [*probe_grids(table), *beside, Table("Every cell", heads, rows)]
    return Page(title=title, lead=lead, parts=parts, command=command)


def _gain(cell: ProbeCell) -> float:
    value = cell.gain.estimate if cell.gain is not None else cell.trained.estimate - cell.chance
    return -math.inf if math.isnan(value) else value


def _rows(cells: list[ProbeCell], controlled: bool, by_checkpoint: bool) -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        value = cell.gain if controlled else cell.trained.estimate - cell.chance
        found.setdefault(cell.site, {})[cell.checkpoint if by_checkpoint else cell.concept] = value
    return found


def _caption(cells: list[ProbeCell], level: float) -> str:
    groups = sorted({cell.trained.groups for cell in cells})
    many = f"{groups[0]:,}" if len(groups) == 1 else f"{groups[0]:,} to {groups[-1]:,}"
    text = f"Held-out groups: {many}."
    if any(not math.isnan(cell.adjusted) for cell in cells):
        text += f" In bold or marked: better than the controls, p adjusted over all cells at most {level:g}."
    return text


def _finding(cell: ProbeCell) -> Finding:
    beside = {
        name: value for name, value in (
            ("untrained", cell.untrained), ("raw observation", cell.input), ("shuffled labels", cell.shuffled),
            ("chance", cell.chance),
        ) if value is not None
    }  # fmt: skip
    where = f"{cell.checkpoint}, {cell.site}" if cell.checkpoint else cell.site
    words = ""
    if not math.isnan(cell.adjusted):
        better = "better" if cell.adjusted <= LEVEL else "not surely better"
        words = f"{better} than the untrained network and shuffled labels (adjusted p {cell.adjusted:.2g})"
    name = "R²" if cell.score == "r2" else f"balanced {cell.score}"
    return Finding(
        question=f"Can {cell.concept} be read?", measured=f"{name}, best at {where}", value=cell.trained, beside=beside,
        words="; ".join(one for one in (words, cell.words) if one),
    )  # fmt: skip


def _cells(table: ProbeTable) -> tuple[list[str], list[list[Any]]]:
    several = any(cell.checkpoint for cell in table)
    names = ["trained", "untrained", "input", "shuffled", "gain", "selectivity", "auc"]
    shown = [name for name in names if any(getattr(cell, name) is not None for cell in table)]
    heads = ["checkpoint"] * several + ["site", "concept", "score", *shown, "chance", "adjusted p", "groups", "rows"]
    rows = [
        [cell.checkpoint] * several
        + [cell.site, cell.concept, cell.score, *(getattr(cell, name) for name in shown), cell.chance, cell.adjusted,
           cell.trained.groups, round(cell.trained.rows)]
        for cell in table
    ]  # fmt: skip
    return heads, rows
