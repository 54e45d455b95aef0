"""``python -m tests.faults``: every fault and how it ends, the table of docs/reliability.md; some with ``--kinds``."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torchrl

from tests.faults.fault import ENDINGS
from tests.faults.kinds import KINDS
from tests.reliability_page import put


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--every", type=int, default=1, help="try every so many-th only")
    asked = parser.parse_args()
    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    found = {kind: endings_of(kind, asked.every) for kind in asked.kinds}
    print(table(found))
    if asked.kinds == list(KINDS) and asked.every == 1:
        put("faults", f"{table(found)}\n\n*`make faults`, {time.strftime('%d %B %Y')}.*")
    sys.exit(any(counts["FAULT"] for counts in found.values()))


def endings_of(kind: str, every: int) -> Counter[str]:
    """How many faults ended in which way; what is wrong is printed."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as shared, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fault in itertools.islice(KINDS[kind](Path(shared)), 0, None, every):
            with tempfile.TemporaryDirectory() as folder:
                ending = fault.ending(Path(folder))
            counts[ending.split(":")[0]] += 1
            if ending.startswith("FAULT"):
                print(f"  {fault.name}\n      {ending[:300]}", flush=True)
    print(f"{kind}: {dict(counts)}", flush=True)
    return counts


def table(found: dict[str, Counter[str]]) -> str:
    """Kinds by endings, in Markdown."""
    heads = [*ENDINGS, "FAULT"]
    rows = [["fault", "tried", *heads], ["---", *["--:"] * (len(heads) + 1)]]
    for kind, counts in {**found, "**all**": sum(found.values(), Counter())}.items():
        rows.append([kind, f"{counts.total():,}", *(f"{counts[one]:,}" if counts[one] else "" for one in heads)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
