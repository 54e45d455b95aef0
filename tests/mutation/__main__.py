"""``python -m tests.mutation``: changes the code, runs the tests, and goes on where it was stopped.

``--out`` is a folder for what each change came to; ``--summary`` only tells what there is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutation.harness import MOST, AllOf, Noted, note, outcomes, warm_up
from tests.mutation.mutators import Mutant, mutants_of
from tests.mutation.plan import GROUPS, ROOT
from tests.reliability_page import put

#: What was found of changes that no test notices, by name.
VERDICTS = Path(__file__).with_name("verdicts.json")
NOTICED = ("killed", "timeout")


def changes(name: str) -> list[Mutant]:
    """All changes of a group but those that only word something, or run where nothing of this environment runs."""
    group = GROUPS[name]
    found = [one for path in group.files() for one in mutants_of(path, ROOT)]
    return [one for one in found if not one.is_words and not one.where.startswith(group.elsewhere or ("-",))]


def chosen(name: str, seed: int) -> list[Mutant]:
    """The changes of a group that are tried, in random order: whatever number of them is, it is a random sample.

    The order is of digests: what of the code stays as it is stays in the sample.
    """
    order = sorted(changes(name), key=lambda one: hashlib.sha256(f"{seed} {one.name} {one.of}".encode()).digest())
    return order[: GROUPS[name].sample]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=MOST, help="of tests for a change, by what they took once")
    parser.add_argument("--again", action="store_true", help="those again that were not noticed")
    parser.add_argument("--files", nargs="*", default=[], help="with --again: by all tests of these files")
    parser.add_argument("--only", nargs="*", default=[], help="changes whose names contain one of these, again")
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.summary:
        warm_up()
    for name in asked.groups:
        _try_all(name, asked.out, asked.seed, asked)
    if asked.groups == list(GROUPS) and not asked.only:
        put("mutants", report(asked.out, asked.seed))


def _try_all(name: str, out: Path, seed: int, asked: argparse.Namespace) -> None:
    log = out / f"{name}.jsonl"
    mutants = _sample(name, log, seed)
    drawn = {one.name for one in mutants}
    if not asked.summary:
        tests = out / f"{name}_tests.json"
        if not asked.files and not tests.exists():
            note(GROUPS[name], tests)
        noted = AllOf(asked.files) if asked.files else Noted(tests, asked.seconds)
        for entry in _entries(log):
            if entry.get("test"):
                noted.noticing.add(entry["name"], entry["test"])
        start = time.monotonic()

        def tell(mutant: Mutant, found: str, test: str) -> None:
            nonlocal start
            now = time.monotonic()
            entry = {"name": mutant.name, "of": mutant.of, "outcome": found, "test": test,
                     "drawn": mutant.name in drawn, "seconds": round(now - start, 1)}  # fmt: skip
            start = now
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

        among = (
            [one for one in changes(name) if any(text in one.name for text in asked.only)] if asked.only else mutants
        )
        known = _known(log, among)
        wanted = among if asked.only else [one for one in among if one.name not in known]
        if asked.again:
            wanted = [one for one in among if known.get(one.name, ("killed",))[-1] not in NOTICED]
        outcomes(GROUPS[name], wanted, noted, tell)
        for one in wanted if asked.only else []:
            print(_known(log, [one])[one.name][-1], one.name)
    counts = Counter(endings[-1] for endings in _known(log, mutants).values())
    print(f"{name}: {counts.total()} of {len(mutants)} tried: {dict(counts)}", flush=True)


def report(out: Path, seed: int) -> str:
    """The score of each group, and what no test notices, in Markdown."""
    verdicts = json.loads(VERDICTS.read_text())
    heads = ["part", "changes", "tried", "noticed at first", "noticed now", "not noticed", "of these explained"]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    left: list[str] = []
    for name, group in GROUPS.items():
        sample = _sample(name, out / f"{name}.jsonl", seed)
        known = _known(out / f"{name}.jsonl", sample)
        missed = [one for one in sample if one.name in known and known[one.name][-1] not in NOTICED]
        tried = max(1, len(known))
        at_first = sum(endings[0] in NOTICED for endings in known.values())
        same = sum(one.name in verdicts for one in missed)
        seen = tried - len(missed)
        rows.append([
            f"`{group.folder}`", f"{len(changes(name)):,}", f"{len(known):,}", f"{at_first:,} ({at_first / tried:.1%})",
            f"{seen:,} ({seen / tried:.1%})", f"{len(missed):,}", f"{same:,}",
        ])  # fmt: skip
        for one in sorted(missed, key=lambda one: (one.path, one.line, one.column)):
            shown = f"{one.where}: {one.change}".replace("|", "\\|")
            path = one.path.removeprefix("tdhook_rl/")
            left.append(f"| `{path}:{one.line}` | `{shown}` | {verdicts.get(one.name, 'open')} |")
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    listed = "\n".join(["| where | change | what it is |", "|---|---|---|", *left])
    when = time.strftime("%d %B %Y")
    return f"{table}\n\n*`make mutants`, {when}, seed {seed}.*\n\n### What no test notices\n\n{listed}"


def _sample(name: str, log: Path, seed: int) -> list[Mutant]:
    """What is drawn now, and what was before: the code may have been another then, or the seed."""
    now = chosen(name, seed)
    before = {entry["name"] for entry in _entries(log) if entry.get("drawn", True)} - {one.name for one in now}
    return [*now, *(one for one in changes(name) if one.name in before)]


def _entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _known(log: Path, mutants: list[Mutant]) -> dict[str, list[str]]:
    """What each change came to at each try, by name, where its function is as it was."""
    wanted = {one.name: one.of for one in mutants}
    found: dict[str, list[str]] = {}
    for entry in _entries(log):
        if wanted.get(entry["name"]) == entry["of"] and entry["outcome"] != "error":
            found.setdefault(entry["name"], []).append(entry["outcome"])
    return found


if __name__ == "__main__":
    main()
