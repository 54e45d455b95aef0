"""``python -m tests.faults``: every fault, how each ends, and the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import torchrl

from tests.faults.kinds import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--every", type=int, default=1, help="try every so many-th only")
    asked = parser.parse_args()
    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as shared, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts: Counter[str] = Counter()
            for fault in itertools.islice(KINDS[kind](Path(shared)), 0, None, asked.every):
                with tempfile.TemporaryDirectory() as folder:
                    ending = fault.ending(Path(folder))
                counts[ending.split(":")[0]] += 1
                if ending.startswith("FAULT"):
                    print(f"  {fault.name}\n      {ending[:300]}", flush=True)
        print(f"{kind}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
