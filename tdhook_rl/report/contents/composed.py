"""Runs as one page: the answer first, then what to be careful of, figures, pictures, tables, files and facts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError
from tdhook_rl.report.contents.answer import findings_of
from tdhook_rl.report.contents.cautions import cautions_of
from tdhook_rl.report.contents.curves import sections_of
from tdhook_rl.report.contents.media import files_of, pictures_of, players_of, tables_of
from tdhook_rl.report.contents.several import differences, findings_over, runs_table
from tdhook_rl.report.contents.sweeps import sweep_drawings_of, sweeps_of
from tdhook_rl.report.page import Cautions, Facts, Figure, Findings, Page, Section, Table
from tdhook_rl.report.page.numbers import frames
from tdhook_rl.report.runs import Run, read_run

#: Names in the table of all numbers.
MOST_NUMBERS = 3000


def page_of(
    runs: Run | str | Path | Sequence[Run | str | Path], *, title: str = "", most_bytes: float = 6e6, command: str = ""
) -> Page:
    """A page of one run, or of several.

    Args:
        runs: folders, as of :func:`tdhook_rl.report.runs.read_run`, or what that function gives.
        title: the names of the runs, unless given.
        most_bytes: of pictures and animations; what has no room is said.
        command: what makes the page again; ``tdhook-rl report`` with the folders, unless given.

    Raises:
        ArtifactError: if one is no run.
        InputError: for no run.

    Example:
        >>> import tempfile
        >>> from tdhook_rl.report import FolderSink
        >>> sink = FolderSink(tempfile.mkdtemp())
        >>> sink.log({"success": 0.25}, 10)
        >>> sink.log({"success": 0.75}, 20)
        >>> sink.close()
        >>> page = page_of(sink.path, title="A run")
        >>> page.title, page.lead
        ('A run', 'A folder of tdhook_rl, up to frame 20.')
    """
    given = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    if not given:
        raise InputError("a report is made of at least one run")
    read = _apart([one if isinstance(one, Run) else read_run(one) for one in given])
    command = command or shlex.join(["tdhook-rl", "report", *(str(run.path) for run in read)])
    title = title or ", ".join(run.name for run in read[:4]) + (f" and {len(read) - 4} more" if len(read) > 4 else "")
    return Page(title=title, lead=_lead(read), parts=_parts(read, most_bytes), command=command)


def _parts(runs: Sequence[Run], most_bytes: float) -> list[Any]:
    figures, undrawn = sections_of(runs)
    gallery, damaged = pictures_of(runs, most_bytes)
    players, unplayed = players_of(runs)
    several = len(runs) > 1
    said = [f"{run.name}: {line}" if several else line for run in runs for line in cautions_of(run)]
    said += [f"{line}." for line in (*damaged, *undrawn, *unplayed)]
    parts: list[Any] = []
    if several:
        parts += [findings_over(runs), Cautions(said), runs_table(runs)]
    else:
        found = findings_of(runs[0])
        told = "" if runs[0].findings else "Intervals are 95%: of probes by held-out group, of other numbers by batch."
        parts += [Findings(found, told) if found else _nothing(runs[0]), Cautions(said)]
    saved = [
        Figure(one.title if not several else f"{one.title} ({run.name})", one.path, one.caption, one.alt, one.data)
        for run in runs for one in run.figures
    ]  # fmt: skip
    parts += [players, *sweep_drawings_of(runs), *saved, *figures, gallery]
    tables = sweeps_of(runs) + tables_of(runs)
    if tables:
        parts.append(Section("Tables", tables))
    parts += [_numbers(runs), files_of(runs)]
    texts = {f"{run.name}: {name}" if several else name: text for run in runs for name, text in run.texts.items()}
    parts += [Facts("Texts", texts) if texts else None, differences(runs) if several else None]
    parts += [
        Facts(f"Settings of {run.name}" if several else "Settings and versions", run.config)
        for run in runs[:3] if run.config
    ]  # fmt: skip
    return [one for one in parts if one is not None]


def _nothing(run: Run) -> str:
    return (
        "Nothing in this run is known to be an answer: it holds no probe, no attribution and no return under a name "
        "that is known. What was logged is below."
        if not run.empty
        else "Nothing of this run could be read."
    )


def _lead(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        kinds = ", ".join(dict.fromkeys(run.kind for run in runs))
        steps = [run.last_step for run in runs if run.last_step is not None]
        far = f", up to {runs[0].axis[:-1]} {max(steps):,}" if steps else ""
        return f"{len(runs)} runs ({kinds}){far}."
    run = runs[0]
    words = [run.kind[:1].upper() + run.kind[1:]]
    if run.last_step is not None and run.series:
        words.append(f"up to {run.axis[:-1]} {run.last_step:,}")
    if run.config.get("seed") is not None:
        words.append(f"seed {run.config['seed']}")
    text = ", ".join(words) + "."
    methods = run.config.get("methods")
    if isinstance(methods, list) and methods:
        names = dict.fromkeys(_method(one) for one in methods)
        text += f" {', '.join(names)}" + (f" of {run.config['policy']}." if run.config.get("policy") else ".")
    return text


def _method(one: Any) -> str:
    return str(one.get("method", one) if isinstance(one, dict) else one).split("(")[0]


def _numbers(runs: Sequence[Run]) -> Table | None:
    """A row for each name: where it began and ended, and between what it was."""
    rows: list[list[Any]] = []
    total = 0
    for run in runs:
        for name, curve in run.series.items():
            total += 1
            if len(rows) >= MOST_NUMBERS:
                continue
            known = [value for _, value in curve if math.isfinite(value)]
            row = [name, len(curve), *((known[0], known[-1], min(known), max(known)) if known else (None,) * 4),
                   len(curve) - len(known) or None, frames(curve[-1][0])]  # fmt: skip
            rows.append([run.name, *row] if len(runs) > 1 else row)
    if not rows:
        return None
    columns = ["name", "points", "first", "last", "smallest", "largest", "not finite", "up to"]
    more = f" {total - len(rows):,} more are in the log." if total > len(rows) else ""
    text = f"{total:,} names.{more} Every value is in the log of the run."
    return Table("All numbers", ["run", *columns] if len(runs) > 1 else columns, rows, text)


def _apart(runs: list[Run]) -> list[Run]:
    """Runs of one name are told apart by where they are, or by their number."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        if names.count(names[number]) > 1:
            longer = f"{run.path.resolve().parent.name}/{run.name}"
            run.name = longer
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        run.name = run.name if seen[run.name] == 1 else f"{run.name} ({seen[run.name]})"
    return runs
