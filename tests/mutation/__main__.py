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
from tests.mutation.plan import GROUPS, ROOT


def chosen(name: str, seed: int) -> list[Mutant]:
    """The changes of a group, in random order: whatever number of them is tried, it is a random sample."""
    group = GROUPS[name]
    found = [one for path in group.files() for one in mutants_of(path, ROOT)]
    random.Random(f"{name} {seed}").shuffle(found)
    return [one for one in found if not one.is_words][: group.sample]


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


def _known(log: Path) -> dict[str, str]:
    """What each change came to, by name."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {entry["name"]: entry["outcome"] for entry in map(json.loads, lines)}


if __name__ == "__main__":
    main()
