"""Several runs side by side: every one of them, and the interquartile mean over them where there are enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tdhook_rl.report.contents.answer import findings_of
from tdhook_rl.report.contents.names import LARGEST
from tdhook_rl.report.page import Finding, Findings, Table
from tdhook_rl.report.page.numbers import is_number, number
from tdhook_rl.report.runs import Run
from tdhook_rl.statistics import Interval, iqm

#: With fewer runs none of which may be left out, an interval would say more than is known.
ENOUGH = 4
#: Notes of runs that are told.
MOST = 3
_LONGEST = 300


def findings_over(runs: Sequence[Run]) -> Findings:
    """Each answer over the runs that give it."""
    by_question: dict[tuple[str, str], dict[str, Finding]] = {}
    for run in runs:
        for one in findings_of(run):
            by_question.setdefault((one.question, one.measured), {})[run.name] = one
    found = [_over(question, measured, of, len(runs)) for (question, measured), of in by_question.items()]
    enough = len(runs) >= ENOUGH
    text = (
        f"Interquartile means over the runs, each run one group, with 95% intervals ({len(runs)} runs)."
        if enough
        else f"{len(runs)} runs are too few for an interval over runs: each is given, in the order of the table."
    )
    return Findings(found, text)


def _over(question: str, measured: str, found: Mapping[str, Finding], runs: int) -> Finding:
    values = {run: _figure(one.value) for run, one in found.items()}
    known = {run: value for run, value in values.items() if math.isfinite(value)}
    met = [one.met for one in found.values() if one.met is not None]
    words = _notes(found, runs)
    if len(known) < runs:
        words = "; ".join(one for one in (f"in {len(known)} of {runs} runs", words) if one)
    value: Any = ", ".join(number(one) for one in known.values()) or "not known"
    if len(known) >= ENOUGH:
        value = iqm([*known.values()])
    elif not known:
        value = next(iter(found.values())).value if len(found) == 1 else "not known"
    controls = dict.fromkeys(name for one in found.values() for name in one.beside)
    beside: dict[str, Any] = {}
    for name in controls:
        numbers = [_figure(one.beside[name]) for one in found.values() if name in one.beside]
        numbers = [one for one in numbers if math.isfinite(one)]
        # What stands beside an answer in some runs only, such as a feature that is the largest in others, says so.
        said = name if len(numbers) in (0, len(known)) else f"{name} (in {len(numbers)} of {runs} runs)"
        if len(numbers) >= ENOUGH:
            beside[said] = iqm(numbers).estimate
        elif numbers:
            beside[said] = ", ".join(map(number, numbers))
    return Finding(
        question=question, measured=measured, value=value, beside=dict(list(beside.items())[:5]), words=words,
        met=all(met) if met else None,
    )  # fmt: skip


def _notes(found: Mapping[str, Finding], runs: int) -> str:
    """What is said of an answer: once where all runs say the same, or else of how many runs each is."""
    notes = Counter(one.words for one in found.values() if one.words)
    if set(notes.values()) == {runs}:
        return next(iter(notes))
    listed = [f"{note} ({count} of {runs} runs)" for note, count in notes.most_common(MOST)]
    told = "; ".join([*listed, *([f"and {len(notes) - MOST} more"] if len(notes) > MOST else [])])
    return told if len(told) <= _LONGEST else "what is to be said of it differs between the runs: see the page of each"


def runs_table(runs: Sequence[Run]) -> Table:
    """A row for each run: its seed, how far it came, and its answers."""
    answers = {run.name: {one.measured: one.value for one in findings_of(run)} for run in runs}
    names = list(dict.fromkeys(name for of in answers.values() for name in of))[:8]
    columns = ["run", "seed", "last step", "ended", *names]
    rows = [
        [run.name, run.config.get("seed"), run.last_step, run.ended, *(answers[run.name].get(name) for name in names)]
        for run in runs
    ]
    return Table("Every run", columns, rows)


def differences(runs: Sequence[Run]) -> Table | None:
    """The settings that are not the same in all runs."""
    flat = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    odd = [name for name in names if len({one.get(name) for one in flat}) > 1][:30]
    if not odd:
        return None
    rows = [[run.name, *(one.get(name, "") for name in odd)] for run, one in zip(runs, flat, strict=True)]
    return Table("What differs between the runs", ["run", *odd], rows)


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", str(value)[:_LONGEST]))
    return found


def _figure(value: Any) -> float:
    """The number alone; NaN for words, and for what no mean can be taken of."""
    found = value.estimate if isinstance(value, Interval) else float(value) if is_number(value) else math.nan
    return found if abs(found) < LARGEST else math.nan
