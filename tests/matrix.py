"""The compatibility matrix: ``python -m tests.matrix`` runs every cell and writes ``docs/compatibility.md``.

Each row is a way to collect, run in a process of its own with a time limit; each cell is judged against what the
network computes (``tests/collecting.py``). The cells of policies are those of ``tests/test_zoo.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torchrl
from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from tdhook_rl.errors import TdhookError
from tdhook_rl.rollout import Guarded, set_controls
from tests.collecting import PROBES, RESULTS, Learner, check, rows_of, version_of
from tests.matrix_rows import ROOT, ROWS, Row, stop_ray

PAGE = ROOT / "docs" / "compatibility.md"
LIMIT = 300.0  # seconds for a row
FORMS = ("none", "raw", "own")
COLUMNS = (*FORMS, "steering", *RESULTS, "live controls")
PATIENCE = 60  # batches within which asynchronous workers must use what they were sent
CONTROLS = {"steering.alpha": 2.0, "probe.x.weight": PROBES[1].weight}


class Session:
    """A row being run: its collector, what it has brought, and what it should have."""

    def __init__(self, row: Row) -> None:
        self.row = row
        torch.manual_seed(0)  # as a policy made in a worker
        self.learner = Learner()
        self.seen: list[TensorDict] = []
        self.weights: Any = None  # for the next evaluation
        self.buffer = None
        if row.storage is not None:
            self.buffer = ReplayBuffer(storage=row.storage(), batch_size=8, shared=row.collector.startswith("Multi"))
        place = self.seen if row.consume == "evaluate" else self.buffer
        self.guarded = Guarded(row.make(self.learner, place), timeout=120)
        self.source = getattr(self, f"_{row.consume}")()
        self.rows: list[TensorDict] = []
        self.annotated: list[TensorDict] = []

    def _iterate(self) -> Iterator[TensorDict]:
        for data in self.guarded:
            yield rows_of([data])

    def _buffer(self) -> Iterator[TensorDict]:
        before = 0
        for _ in self.guarded:
            now = len(self.buffer)
            if now > before:
                yield self.buffer[torch.arange(before, now)].to_tensordict()
                before = now

    def _background(self) -> Iterator[TensorDict]:
        self.guarded.start()
        before = 0
        while True:
            limit = time.monotonic() + 60
            # Another worker may be writing the newest rows.
            while (now := len(self.buffer) - 64) < before + 32:
                self.guarded.check()
                assert time.monotonic() < limit, "nothing is collected in the background"
                time.sleep(0.01)
            yield self.buffer[torch.arange(before, now)].to_tensordict()
            before = now

    def _evaluate(self) -> Iterator[TensorDict]:
        while True:
            self.guarded.evaluate(self.weights)
            yield rows_of(self.seen[-1:])

    def take(self) -> TensorDict:
        """The next rows, random frames left out."""
        while True:
            rows = next(self.source)
            for key in self.learner.policy._step_keys():
                assert rows.get(key, None) is not None, f"{key} is absent"
            rows = rows[rows["computed", "cache"]]
            if len(rows):
                break
        self.rows.append(rows)
        now = version_of(rows, self.learner.versions) == len(self.learner.versions) - 1
        alpha = self.learner.policy.controls["steering.alpha"]
        now &= rows["control", "steering.alpha"] == alpha
        if bool(now.any()):
            self.annotated.append(self.learner.policy.annotate(rows[now], on_mismatch="raise"))
        return rows

    def until(self, right: Callable[[TensorDict], torch.Tensor], what: str) -> None:
        """Take rows until some are right; of a strict collector all of the next must be."""
        if self.row.strict:
            assert bool(right(self.take()).all()), f"the next batch does not have {what}"
            return
        for _ in range(PATIENCE):
            if bool(right(self.take()).any()):
                return
        raise AssertionError(f"{what} never came to the workers")

    def send(self, form: str) -> None:
        """New weights, in one of the forms; they must come to be used."""
        learner = self.learner
        if form == "raw":  # a learner that shares nothing with the collector
            other = copy.deepcopy(learner.actor)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            learner.versions.append(copy.deepcopy(other.module[0].module).requires_grad_(False))
            self._push(TensorDict.from_module(other))
            learner.actor.load_state_dict(other.state_dict())
        else:
            learner.step()
            self._push(TensorDict.from_module(learner.policy) if form == "own" else None)
        newest = len(learner.versions) - 1
        self.until(lambda rows: version_of(rows, learner.versions) == newest, "the new weights")

    def _push(self, weights: Any) -> None:
        if self.row.consume == "evaluate":
            self.weights = weights
        else:
            self.guarded.update_policy_weights_(weights)

    def set_controls(self) -> None:
        set_controls(self.guarded, CONTROLS)
        own = self.learner.policy.controls
        if float(own["steering.alpha"]) != CONTROLS["steering.alpha"]:  # workers with controls of their own
            own.update_(CONTROLS)
        self.until(lambda rows: rows["control", "steering.alpha"] == CONTROLS["steering.alpha"], "the new controls")


def run_row(row: Row) -> dict[str, str]:
    """The outcome of each cell of a row: ``"ok"``, ``"-: reason"`` where there is none, or what went wrong."""
    outcome = {column: f"-: {row.lacks[column]}" if column in row.lacks else "not run" for column in COLUMNS}

    def attempt(column: str, function: Callable[[], Any]) -> None:
        if column in row.lacks:
            return
        try:
            function()
            outcome[column] = "ok"
        except TdhookError as error:
            outcome[column] = f"refused: {error}"
        except Exception as error:
            outcome[column] = f"wrong: {type(error).__name__}: {error}"

    session = Session(row)
    try:
        session.take()
        for form in FORMS:
            attempt(form, lambda form=form: session.send(form))
        attempt("live controls", session.set_controls)
    finally:
        session.guarded.shutdown()
        if row.needs == "ray":
            stop_ray()
    # A step may see the weights or controls change: one step of each of two workers, twice two environments.
    allowed = 0 if row.strict else 4 * (len(FORMS) + 1)
    for what in ("steering", *RESULTS):
        data = torch.cat(session.annotated if what == "saliency per batch" else session.rows)
        attempt(what, lambda what=what, data=data: check(data, session.learner.versions, what, allowed))
    return outcome


def run_policy(policy: str) -> dict[str, str]:
    """The outcome of each method on a policy of the zoo, in a collector."""
    import pytest

    zoo = importlib.import_module("tests.test_zoo")
    outcome = {}
    for method, cell in zoo.CELLS.items():
        if not cell.needs(zoo.ZOO[policy]):
            outcome[method] = "-: the policy has no value to explain"
            continue
        torch.manual_seed(0)
        try:
            zoo.test_cell(policy, method)
            outcome[method] = "ok"
        except pytest.skip.Exception as error:
            outcome[method] = f"-: {error}"
        except TdhookError as error:
            outcome[method] = f"refused: {error}"
        except Exception as error:
            outcome[method] = f"wrong: {type(error).__name__}: {error}"
    return outcome


# ---------------------------------------------------------------------- each row in its process


def in_process(kind: str, name: str, limit: float = LIMIT) -> dict[str, str]:
    """Run a row in a process of its own; what is left of it after the limit is killed."""
    command = [sys.executable, "-m", "tests.matrix", f"--{kind}", name]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"": f"wrong: not over after {limit:g} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = output.strip().splitlines()
    if process.returncode or not lines:
        last = next((line for line in reversed(errors.strip().splitlines()) if "Error" in line), "no output")
        return {"": f"wrong: exit code {process.returncode}, {last}"}
    return json.loads(lines[-1])


def policies() -> list[str]:
    return list(importlib.import_module("tests.zoo").ZOO) if find_spec("tests.zoo") else []


def write() -> bool:
    """Run everything and write the page; whether nothing went wrong."""
    notes: list[str] = []
    text = [HEADER.format(**{name: version(name) for name in ("torch", "tensordict", "torchrl")})]
    rows = []
    for row in ROWS:
        if row.needs is not None and find_spec(row.needs) is None:
            rows.append([row.collector, row.weights, *["not run"] * len(COLUMNS)])
            continue
        found = in_process("row", row.name)
        rows.append([row.collector, row.weights, *cells(found, COLUMNS, notes)])
        print(row.name, *rows[-1][2:], sep=" | ", file=sys.stderr, flush=True)
    text.append(table(["collector", "weights sent by", *COLUMNS], rows))
    if policies():
        methods = list(importlib.import_module("tests.test_zoo").CELLS)
        rows = []
        for policy in policies():
            rows.append([f"`{policy}`", *cells(in_process("policy", policy), methods, notes)])
            print(policy, *rows[-1][1:], sep=" | ", file=sys.stderr, flush=True)
        text += [POLICIES, table(["policy", *methods], rows)]
    text.append("## Notes\n\n" + "\n".join(f"{index}. {note}" for index, note in enumerate(notes, 1)) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(text))
    return not any("wrong" in line for line in text)


def cells(found: dict[str, str], columns: Any, notes: list[str]) -> list[str]:
    """``ok``, ``refused`` or a dash, the last two with the number of a note."""

    def cell(column: str) -> str:
        outcome = found.get(column, found.get("", "not run"))
        word, _, reason = outcome.partition(": ")
        if not reason:
            return word
        reason = " ".join(reason.split())
        if reason not in notes:
            notes.append(reason)
        return f"{'—' if word == '-' else word} [{notes.index(reason) + 1}](#notes)"

    return [cell(column) for column in columns]


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


HEADER = """# Compatibility

Written by `make matrix`, which runs every cell: nothing here is by hand. With torch {torch}, tensordict {tensordict}
and torchrl {torchrl}, on CPU.

## Collectors

One policy with five methods on it is collected while its weights and its controls change. A cell is `ok` if every row
of the data holds what the network computes from the observation of the row, with the weights and controls that were in
force, across the ends of episodes, at every step. `refused` is an error that says what to do; a dash is what TorchRL
does not offer.

- `none`, `raw`, `own`: `update_policy_weights_()` is given nothing, the weights of a learner that shares nothing with
  the collector (`TensorDict.from_module(learner)`), or those of the hooked policy; the workers then use them.
- `live controls`: `set_controls(collector, ...)` reaches the running workers, and the data record it.
- `saliency per batch` is `policy.annotate(batch)`.
"""

POLICIES = """## Policies

Every method on every policy of `tests/zoo.py`, in a `Collector`, while the weights change, against the same numbers
written out by hand.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", help="run one row, and print its cells as JSON")
    parser.add_argument("--policy", help="run one policy of the zoo, and print its cells as JSON")
    options = parser.parse_args()
    if options.row is None and options.policy is None:
        return 0 if write() else 1
    warnings.simplefilter("ignore")
    torchrl.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    if options.policy is not None:
        found = run_policy(options.policy)
    else:
        found = run_row(next(row for row in ROWS if row.name == options.row))
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
