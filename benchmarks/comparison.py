"""One method on one case: what it should give, and what this library and its peers give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ROWS", "Case", "Outcome", "Row", "compare", "row"]

Run = Callable[[], Any]
PEERS = ("captum", "tdhook")


@dataclass(frozen=True)
class Case:
    """A case with random weights and inputs, in float64.

    Attributes:
        expected: what an independent computation gives.
        ours: what this library gives.
        captum, tdhook: what a peer gives, called on a network of its own; ``None`` where it offers no such method;
            words where it offers something else under the name.
    """

    expected: Any
    ours: Run
    captum: Run | str | None = None
    tdhook: Run | str | None = None


@dataclass(frozen=True)
class Row:
    """What is computed, what it is held against, and what makes a case of it."""

    method: str
    oracle: str
    make: Callable[[], Case]


#: Every row, in the order of the files.
ROWS: list[Row] = []


def row(method: str, oracle: str) -> Callable[[Callable[[], Case]], Row]:
    """Make a row of a maker of cases. A method's rows are named in :mod:`tests.method_table`."""

    def enter(make: Callable[[], Case]) -> Row:
        ROWS.append(Row(method, oracle, make))
        return ROWS[-1]

    return enter


@dataclass(frozen=True)
class Outcome:
    """How far something is from what was expected, in units of the largest expected value, or why it is not known."""

    error: float | None = None
    words: str = ""

    def __str__(self) -> str:
        return self.words or ("0" if self.error == 0 else f"{self.error:.1e}")

    def worse(self, other: Outcome) -> Outcome:
        """The worse of two: words before numbers."""
        if self.words or other.words:
            return self if self.words else other
        return max(self, other, key=lambda one: one.error or 0.0)


def compare(make: Callable[[], Case], seeds: int = 3, names: Sequence[str] = ("ours", *PEERS)) -> dict[str, Outcome]:
    """The worst outcome of this library and of each peer over several random cases."""
    worst: dict[str, Outcome] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        case = make()
        for name in names:
            outcome = _outcome(name, getattr(case, name), case.expected)
            worst[name] = outcome.worse(worst[name]) if name in worst else outcome
    return worst


def _outcome(name: str, run: Run | str | None, expected: Any) -> Outcome:
    if run is None or isinstance(run, str):
        return Outcome(words=run or "-")
    if name in PEERS and find_spec(name) is None:
        return Outcome(words="not installed")
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run()
    except Exception as error:  # whatever a peer raises is its outcome
        if name == "ours":
            raise
        return Outcome(words=f"raises {type(error).__name__}")
    found, expected = _tensor(found), _tensor(expected)
    if found.shape != expected.shape:
        return Outcome(words=f"shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    scale = float(expected.abs().max()) or 1.0
    return Outcome(error=float((found - expected).abs().max()) / scale)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.as_tensor(np.asarray(value), dtype=torch.float64)
