"""What was measured, as a page and as JSON: every figure, budgets that are missed, and where others are faster."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.budgeted import PEERS, Figure, digits
from benchmarks.growth import Growth
from benchmarks.pairs import Median

__all__ = ["Measured", "as_json", "as_page", "faster", "missed", "write"]

NAME = "benchmarks"
#: Told on the page beside the peers; all are in the JSON file.
NAMED = ("tdhook_rl", "torch", "tensordict", "torchrl", "numpy")


@dataclass
class Measured:
    """One group of figures that was run.

    Attributes:
        name: of the group.
        about: what it shows, in a sentence.
        command: that runs it alone.
        figures, growth: what it gave.
        seconds: by the wall, and of the processor.
        failed: what ended it, if something did; what it gave before stays.
    """

    name: str
    about: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    failed: str = ""


def missed(groups: Iterable[Measured]) -> list[Figure]:
    """Figures whose budget is not kept."""
    return [figure for group in groups for figure in group.figures if figure.met is False]


def faster(groups: Iterable[Measured]) -> list[Figure]:
    """Figures of peers that are faster (or smaller), their interval above one."""
    return [figure for group in groups for figure in group.figures if figure.peer and figure.ratio.low > 1]


def write(groups: Sequence[Measured], folder: Path) -> None:
    """Write ``benchmarks.md`` and ``benchmarks.json`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    (folder / f"{NAME}.md").write_text(as_page(groups, where))
    (folder / f"{NAME}.json").write_text(_in_lines(as_json(groups, where)) + "\n")


def _in_lines(found: dict[str, Any]) -> str:
    """JSON with one figure a line, so that two runs can be held side by side."""
    lines: list[str] = []

    def held(figure: dict[str, Any]) -> str:
        lines.append(json.dumps(figure))
        return f"@{len(lines) - 1}@"

    groups = [
        group | {kind: [held(one) for one in group[kind]] for kind in ("figures", "growth")}
        for group in found["groups"]
    ]
    text = json.dumps(found | {"groups": groups}, indent=1)
    return re.sub(r'"@(\d+)@"', lambda place: lines[int(place[1])], text)


def machine() -> dict[str, Any]:
    """The processor, how busy it is, and the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def as_json(groups: Sequence[Measured], where: dict[str, Any]) -> dict[str, Any]:
    """Everything, as numbers and words."""
    return {
        "machine": where,
        "versions": dict(sorted({one.name: one.version for one in distributions()}.items())),
        "groups": [
            {
                "name": group.name,
                "command": group.command,
                "seconds": {"wall": round(group.seconds[0], 1), "cpu": round(group.seconds[1], 1)},
                "failed": group.failed,
                "figures": [figure.as_dict() for figure in group.figures],
                "growth": [growth.as_dict() for growth in group.growth],
            }
            for group in groups
        ],
    }


# ------------------------------------------------------------------ the page


def as_page(groups: Sequence[Measured], where: dict[str, Any]) -> str:
    """The page in Markdown."""
    broken, behind = missed(groups), faster(groups)
    held = sum(figure.met is not None for group in groups for figure in group.figures)
    count = sum(len(group.figures) for group in groups)
    wall, processor = (sum(group.seconds[place] for group in groups) / 60 for place in (0, 1))
    parts = [
        "# What it costs",
        f"Written by `make bench` on {where['date']}: {count} ratios, {held} of which are held to a budget; "
        f"{len(broken)} miss theirs. {wall:.0f} minutes, {processor:.0f} of the processor.",
        "Every ratio is ours over another's on equal work, of which the results were checked to be equal where both "
        f"compute the same: below 1 ours is faster. Contenders take turns in {_rounds(groups)} interleaved rounds, in "
        "process CPU time on one thread unless the wall's is named; a ratio is the median over the rounds with its "
        "95 % bootstrap interval, a time the median with its quartiles. By hand is what one would write for this case "
        "alone, with plain torch.",
        _machine_line(where),
        _peers_line(),
        *[f"**The group {group.name} ended early: {group.failed}.**" for group in groups if group.failed],
        "## Budgets that are missed",
        _listed(broken, "None.", lambda one: _kept(f"at most {one.most:.4g}")),
        "## Where others are faster",
        "Where the interval of ours over a peer's lies above 1, with a budget or without.",
        _listed(behind, "Nowhere.", lambda one: ""),
    ]
    for group in groups:
        parts += [f"## {group.about}", f"`{group.command}`"]
        parts += _tables(group.figures) if group.figures else []
        parts += [_growth_table(group.growth)] if group.growth else []
    parts += [
        "## To repeat it",
        "```\n"
        "make bench                              # everything, and this page: under 20 minutes on two quiet cores\n"
        "make bench BENCH='--only calls probes'  # some groups, printed\n"
        "make bench BENCH=--quick                # two rounds of each, printed: does it run?\n"
        "```",
        "Medians, quartiles, ratios, budgets and the versions of all packages are in "
        "[benchmarks.json](benchmarks.json).",
    ]
    return "\n\n".join(parts) + "\n"


def _rounds(groups: Iterable[Measured]) -> str:
    counts = sorted({figure.pairs for group in groups for figure in group.figures})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))


def _machine_line(where: dict[str, Any]) -> str:
    busy = where["load"] > 1.5
    also = " Other programs wanted the processor as well, which widens intervals and the wall's times." if busy else ""
    return f"{where['processor']}, {where['cores']} cores, load {where['load']}, Python {where['python']}.{also}"


def _peers_line() -> str:
    peers = ", ".join(f"{name} {_version(name)}" for name in PEERS)
    return f"With {', '.join(f'{name} {_version(name)}' for name in NAMED)}. Peers: {peers}."


def _version(name: str) -> str:
    try:
        # A checkout on the path may lie beside a distribution of the name.
        return version(name) if find_spec({"scikit-learn": "sklearn"}.get(name, name)) else "not installed"
    except PackageNotFoundError:
        return "not installed"


def _listed(figures: list[Figure], none: str, budget: Any) -> str:
    if not figures:
        return none
    rows = [
        [one.what, _kept(one.case), f"{one.ours} / {one.against}", _interval(one.ratio), *filter(None, [budget(one)])]
        for one in figures
    ]
    heading = ["what", "case", "ours / against", "ratio", "budget"][: len(rows[0])]
    return _markdown(heading, rows)


def _tables(figures: list[Figure]) -> list[str]:
    """A table for each kind of work: a row for each case, a column for each that it is compared with."""
    found = []
    for what in dict.fromkeys(figure.what for figure in figures):
        chosen = [figure for figure in figures if figure.what == what]
        others = list(dict.fromkeys(figure.against for figure in chosen))
        cells: dict[tuple[str, str], dict[str, Figure]] = {}
        for figure in chosen:
            cells.setdefault((figure.case, figure.ours), {})[figure.against] = figure
        rows = []
        for (case, ours), beside in cells.items():
            one = next(iter(beside.values()))
            spent = _kept(f"{_number(one.medians[0])} {one.unit}<br>{_spread(one.quartiles[0])}")
            rows.append([f"{_kept(case)}<br>{_kept(ours)}", spent, *(_cell(beside.get(name)) for name in others)])
        found += [_markdown([what, "ours", *others], rows), *_notes(chosen)]
    return found


def _notes(figures: list[Figure]) -> list[str]:
    """What is said of some cases, once."""
    cases: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if figure.note:
            cases.setdefault((figure.against, figure.note), []).append(figure.case)
    lines = []
    for (against, note), named in cases.items():
        of = "" if len(named) == len({figure.case for figure in figures}) else f" ({'; '.join(dict.fromkeys(named))})"
        lines.append(f"- {against}{of}: {note}.")
    return ["\n".join(lines)] if lines else []


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    lines = [_kept(f"{_number(figure.medians[1])} {figure.unit}"), f"**{_interval(figure.ratio)}**"]
    if figure.most is not None:
        lines.append(_kept(f"at most {figure.most:.4g}{'' if figure.met else ': **missed**'}"))
    return "<br>".join(lines)


def _growth_table(growth: list[Growth]) -> str:
    """Exponents first: 1 where twice as much takes twice as long."""
    rows = []
    for one in growth:
        times = ", ".join(f"{size:,}: {_number(time)}" for size, time in zip(one.sizes, one.medians, strict=True))
        clock = " (wall)" if one.clock == "wall" else ""
        rows.append([one.what, one.of, _interval(one.exponent), _interval(one.last), times + clock])
    return _markdown(["what grows", "in", "exponent", "at the end", "milliseconds"], rows)


def _interval(found: Median) -> str:
    return _kept(f"{digits(found.median)} [{digits(found.low)}, {digits(found.high)}]")


def _kept(text: str) -> str:
    """On one line."""
    return text.replace(" ", "&nbsp;")


def _spread(quartiles: tuple[float, float]) -> str:
    return f"({_number(quartiles[0])} to {_number(quartiles[1])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
