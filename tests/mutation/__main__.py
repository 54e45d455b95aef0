"""``python -m tests.mutation``: changes the code, runs the tests, and goes on where it was stopped.

``--out`` is a folder for what each change came to; ``--summary`` only tells what there is.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

from tests.mutation.harness import Noted, note, outcomes, warm_up
from tests.mutation.mutators import Mutant, mutants_of
from tests.mutation.plan import GROUPS, ROOT, Group
from tests.reliability_page import put

#: What was found of changes that no test notices, by name.
VERDICTS = Path(__file__).with_name("verdicts.json")


def chosen(name: str, seed: int) -> list[Mutant]:
    """The changes of a group, in random order: whatever number of them is tried, it is a random sample."""
    group = GROUPS[name]
    found = [one for path in group.files() for one in mutants_of(path, ROOT)]
    random.Random(f"{name} {seed}").shuffle(found)
    own = [one for one in found if not one.is_words and not one.where.startswith(group.elsewhere or ("-",))]
    return own[: group.sample]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("runs/mutants"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="those again that were not noticed")
    parser.add_argument("--files", nargs="*", default=[], help="with --again: by all tests of these files")
    parser.add_argument("--only", default="", help="changes whose name contains this, again")
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.summary:
        warm_up()
    for name in asked.groups:
        _try_all(name, asked.out, asked.seed, asked)
    put("mutants", report(asked.out, asked.seed))


def _try_all(name: str, out: Path, seed: int, asked: argparse.Namespace) -> None:
    log = out / f"{name}.jsonl"
    known = _known(log)
    mutants = chosen(name, seed)
    if not asked.summary:
        tests = out / f"{name}_tests.json"
        if not tests.exists():
            note(GROUPS[name], tests)
        start = time.monotonic()

        def tell(mutant: Mutant, found: str) -> None:
            nonlocal start
            now = time.monotonic()
            entry = {"name": mutant.name, "kind": mutant.kind, "outcome": found, "seconds": round(now - start, 1)}
            start = now
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

        missed = {one for one, ending in known.items() if ending in ("survived", "error", "not run")}
        wanted = [one for one in mutants if asked.only in one.name and (asked.only or one.name not in known)]
        wanted = [one for one in mutants if one.name in missed] if asked.again else wanted
        outcomes(GROUPS[name], wanted, Noted(tests), tell, asked.files)
        known = _known(log)
    counts = Counter(known[one.name] for one in mutants if one.name in known)
    print(f"{name}: {sum(counts.values())} of {len(mutants)} tried: {dict(counts)}", flush=True)


def report(out: Path, seed: int) -> str:
    """The score of each group, and what no test notices, in Markdown."""
    verdicts = json.loads(VERDICTS.read_text())
    heads = ["part", "changes", "tried", "noticed", "not noticed", "run by no test", "share noticed"]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    left: list[str] = []
    for name, group in GROUPS.items():
        # As the log has them: the sources may have changed since.
        known = _known(out / f"{name}.jsonl").items()
        tried = {one: ending for one, ending in known if ending != "error" and _counts(one, group)}
        counts = Counter(tried.values())
        seen, missed, unrun = counts["killed"] + counts["timeout"], counts["survived"], counts["not run"]
        everything = sum(1 for path in group.files() for _ in mutants_of(path, ROOT))
        rows.append([f"`{group.folder}`", f"{everything:,}", f"{len(tried):,}", f"{seen:,}", f"{missed:,}",
                     f"{unrun:,}", f"{seen / max(1, len(tried)):.0%}"])  # fmt: skip
        for one, ending in sorted(tried.items()):
            if ending in ("survived", "not run"):
                path, place = one.removeprefix("tdhook_rl/").split(" ", 1)
                shown = place.replace("|", "\\|")
                left.append(f"| `{path}` | `{shown}` | {verdicts.get(one, 'open')} |")
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    listed = "\n".join(["| where | change | what it is |", "|---|---|---|", *left])
    when = time.strftime("%d %B %Y")
    return f"{table}\n\n*`make mutants`, {when}, seed {seed}.*\n\n### What no test notices\n\n{listed}"


def _counts(name: str, group: Group) -> bool:
    """Whether a change is one that a test of this environment is to notice, and of no words."""
    path, where, change = name.split(" ", 2)
    before = change.split(" -> ")[0]
    words = before[:1] in ("'", '"') and " " in before
    left_out = Path(path.split(":")[0]).name in group.without or where.startswith(group.elsewhere or ("-",))
    return not words and not left_out


def _known(log: Path) -> dict[str, str]:
    """What each change came to, by name."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {entry["name"]: entry["outcome"] for entry in map(json.loads, lines)}


if __name__ == "__main__":
    main()
