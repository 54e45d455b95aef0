"""A sweep as a page: what steering does, beside controls, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.page import Cautions, Facts, Finding, Findings, Fragment, Page, Section, Table
from tdhook_rl.report.page.numbers import shown
from tdhook_rl.report.steering import LEVEL, ends, half_of, runs_of, steering_curve, sweep_grid
from tdhook_rl.sweeps import SweepResult, SweepRow

#: So many vectors have a curve of their own; more are in the grid and the table.
MOST = 6
#: So many outcomes that should not suffer are drawn below a curve.
COSTS = 3
#: How actions were taken, in words, by TorchRL's type of exploration; without one by what each module has.
ACTIONS = {
    "random": "actions drawn", "deterministic": "likeliest actions", "mode": "likeliest actions",
    "mean": "mean actions", "median": "median actions", "none": "actions as the policy takes them by itself",
}  # fmt: skip
#: With fewer random directions their range says little.
FEW = 5


def sweep_page(
    result: SweepResult,
    outcome: str | None = None,
    *,
    competence: Sequence[str] | None = None,
    player: Any = None,
    title: str = "What steering does",
    command: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Page:
    """A page of a sweep: the effect at the strongest alpha beside its controls, what it costs, curves, every number.

    Args:
        result: of :func:`tdhook_rl.sweeps.steering_sweep`.
        outcome: what was to change; the first unless given.
        competence: what should not suffer; all other outcomes unless given.
        player: of the same episodes, steered and not, as of :func:`tdhook_rl.report.player`.
        title: of the page.
        command: what makes it again.
        facts: more to be known of it.

    Raises:
        InputError: for an outcome that was not measured.

    Example:
        >>> import torch
        >>> from tdhook_rl.sweeps import Condition
        >>> played = [Condition(), Condition(draw=1), Condition("up", 1.0), Condition("up", 1.0, "random", 0)]
        >>> won = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).double()
        >>> sweep_page(SweepResult(conditions=played, values={"won": won})).lead[:38]
        'up at alpha 1 changes won by +0.750 (-'
    """
    outcome, costs = chosen_outcomes(result, outcome, competence)
    rows = _strongest_rows(result, outcome)
    parts: list[Any] = [
        Findings(sweep_findings(result, outcome, costs), text=f"{played_in_words(result)} Intervals are 95%."),
        Cautions(sweep_cautions(result, outcome)),
        *sweep_drawings(result, outcome, costs),
    ]
    if player is not None:
        parts.append(Section("Episodes, step by step", [Fragment("", player.fragment())]))
    parts += [sweep_rows(result), Facts("Settings", {**result.facts, **(facts or {})})]
    return Page(title=title, lead=_lead(result, outcome, costs, rows[0]), parts=parts, command=command)


def chosen_outcomes(
    result: SweepResult, outcome: str | None = None, competence: Sequence[str] | None = None
) -> tuple[str, list[str]]:
    """What was to change, and what should not suffer."""
    found = result.outcomes[0] if outcome is None else outcome
    result.of(found)  # raises
    return found, [one for one in (result.outcomes if competence is None else competence) if one != found]


def sweep_findings(result: SweepResult, outcome: str, competence: Sequence[str] = ()) -> list[Finding]:
    """For each vector its effect at the strongest alpha beside its controls, and what becomes of competence."""
    found = []
    for row in _strongest_rows(result, outcome)[: 2 * MOST]:
        alpha = f"at alpha {row.alpha:g}"
        found.append(
            Finding(
                question=f"Does {row.vector} change {outcome}?",
                measured=f"change of {outcome} {alpha}",
                value=row.effect,
                beside=_beside(row),
                words="; ".join(one for one in (_verdict(row), _from_to(row), _half(result, row)) if one),
            )
        )
        for cost in competence:
            other = result.row(cost, row.vector, row.alpha)
            found.append(
                Finding(
                    question=f"What does {row.vector} cost?", measured=f"change of {cost} {alpha}", value=other.effect,
                    beside=_beside(other), words=_from_to(other),
                )
            )  # fmt: skip
    return found


def sweep_cautions(result: SweepResult, outcome: str) -> list[str]:
    """What a reader has to know before believing it."""
    lines = []
    if not result.paired:
        lines.append(
            "Alpha 0 played twice from the same seeds differs: the environment draws by itself, or holds something "
            "from episode to episode, so that conditions are not paired and intervals are wider."
        )
    unfinished = float(result.facts.get("unfinished", 0.0))
    if unfinished:
        limit = result.facts.get("max_steps", "the longest")
        lines.append(
            f"{100 * unfinished:.1f}% of all episodes did not end within {limit} steps and count as they were."
        )
    for row in _strongest_rows(result, outcome):
        if not len(row.random):
            lines.append(f"{row.vector} has no controls: any direction of its norm might do the same.")
        elif len(row.random) < FEW:
            lines.append(
                f"{row.vector} stands beside {len(row.random)} random direction{'s' * (len(row.random) > 1)} only."
            )
        half = half_of(result, outcome, row.vector)
        lines += [f"{row.vector}: {one.words}." for one in (row.effect, half) if one is not None and not one.known]
    return list(dict.fromkeys(lines))[:40]


def sweep_drawings(result: SweepResult, outcome: str, competence: Sequence[str] = ()) -> list[Drawing]:
    """The curves of those that do most, and of several vectors the grid."""
    names = list(dict.fromkeys(row.vector for row in _strongest_rows(result, outcome)))[:MOST]
    grid = [sweep_grid(result, outcome)] if len(result.vectors) > 1 else []
    return grid + [steering_curve(result, outcome, name, competence=competence[:COSTS]) for name in names]


def sweep_rows(result: SweepResult) -> Table:
    """Every vector, strength and outcome."""
    kinds = [kind for kind in ("random", "shuffled") if any(len(getattr(one, kind)) for one in result.table())]
    heads = ["vector", "alpha", "outcome", "at alpha 0", "mean", "effect"]
    heads += [f"{kind}, {what}" for kind in kinds for what in ("mean", "furthest")] + ["specificity"] * bool(kinds)
    rows = []
    for one in result.table():
        row = [one.vector, one.alpha, one.outcome, one.baseline, one.mean, one.effect]
        for kind in kinds:
            effects = getattr(one, kind)
            row += [float(effects.mean()), _furthest(effects)] if len(effects) else [None, None]
        special = one.specificity if one.specificity is None or one.specificity.known else float(one.specificity)
        rows.append([*row, *([special] * bool(kinds)), one.p, one.adjusted, round(one.mean.rows)])
    text = "Effects are against alpha 0; p-values are adjusted over all rows of an outcome (Holm)."
    return Table("Every vector and strength", [*heads, "p", "adjusted p", "episodes"], rows, text)


def _strongest_rows(result: SweepResult, outcome: str) -> list[SweepRow]:
    """Each vector at its strongest to either side, those that do most first."""
    table = result.table(outcome)
    rows = [one for one in table if one.alpha in ends(result, one.vector)]
    return sorted(rows, key=lambda one: -abs(one.effect.estimate))


def _lead(result: SweepResult, outcome: str, competence: Sequence[str], row: SweepRow) -> str:
    at = f"{row.vector} at alpha {row.alpha:g}"
    first = f"{at} changes {outcome} by {_signed(row)}, {_from_to(row)}"
    beside = [
        f"one {name.replace('directions', 'direction')} changes it by {shown(float(effects))}"
        if len(effects) == 1
        else f"{len(effects)} {name} change it by {shown(float(effects.min()))} to {shown(float(effects.max()))}"
        for name, effects in (("random directions of equal norm", row.random), ("of shuffled labels", row.shuffled))
        if len(effects)
    ]
    verdict = _verdict(row)
    told = ["; ".join([first, *beside, f"this is {verdict}" if len(row.random) else verdict])]
    half = _half(result, row)
    told += [half[:1].upper() + half[1:]] if half else []
    costs = [result.row(one, row.vector, row.alpha) for one in competence[:COSTS]]
    told += [f"Beside it {', '.join(f'{one.outcome} goes {_from_to(one)}' for one in costs)}"] if costs else []
    if len(result.vectors) > 1:
        told.append(f"It does most of {len(result.vectors)} vectors")
    return ". ".join(told) + "."


def played_in_words(result: SweepResult) -> str:
    """How many episodes of what, and how they were played."""
    facts = result.facts
    how = str(facts.get("exploration", "")).rpartition(".")[2].lower()
    actions = ACTIONS.get(how, how)
    count = next(iter(result.values.values())).shape[1]
    runs = runs_of(result)
    words = [f"{count:,} episodes of each of {len(result.conditions):,} conditions"]
    words += [f"of {len(runs)} training runs, which intervals are over"] * bool(runs)
    words += [str(one) for one in (facts.get("layout"), actions) if one]
    paired = "from the same starts with the same noise" if result.paired else "not paired"
    ended = "all ended" if not float(facts.get("unfinished", 0.0)) else ""
    return ", ".join(one for one in (*words, paired, ended) if one) + "."


def _verdict(row: SweepRow) -> str:
    if not len(row.random):
        return "no controls were played"
    than = "than random directions of equal norm"
    known = "" if math.isnan(row.adjusted) else f" (adjusted p {row.adjusted:.2g})"
    return f"more {than}{known}" if row.adjusted <= LEVEL else f"not surely anything, or more {than}{known}"


def _half(result: SweepResult, row: SweepRow) -> str:
    half = half_of(result, row.outcome, row.vector) if row.alpha > 0 else None
    return f"half of it is reached at alpha {shown(half)}" if half is not None and half.known else ""


def _from_to(row: SweepRow) -> str:
    return f"from {shown(row.baseline.estimate)} to {shown(row.mean.estimate)}"


def _signed(row: SweepRow) -> str:
    return f"{'+' if row.effect.estimate > 0 else ''}{shown(row.effect)}"


def _beside(row: SweepRow) -> dict[str, float]:
    named = (("random direction that does most", row.random), ("shuffled labels that do most", row.shuffled))
    return {name: _furthest(effects) for name, effects in named if len(effects)}


def _furthest(effects: Tensor) -> float:
    return float(effects[effects.abs().argmax()])
