"""Every kind of fault ends whole, resumable or with a named error: some of each here, all of them by `make faults`."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.kinds import KINDS

#: How many of each kind are tried by `make test`, unless given: `tests/test_workers.py` kills workers there.
SOME = 7
SOME_OF: dict[str, int] = {"signals to workers": 0, "signals beside workers": 0, "sequences of operations": 1}


def _faults(kind: str, folder: Path) -> list[Fault]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(KINDS[kind](folder))


def _wrong(faults: list[Fault], tmp_path: Path) -> list[str]:
    endings = []
    for number, fault in enumerate(faults):
        place = tmp_path / str(number)
        place.mkdir()
        endings.append(f"{fault.name}: {fault.ending(place)}")
    return [one for one in endings if ": FAULT" in one]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if SOME_OF.get(kind, SOME)])
def test_some_of_each_kind(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    faults = _faults(kind, tmp_path_factory.mktemp("shared"))
    chosen = random.Random(kind).sample(faults, min(len(faults), SOME_OF.get(kind, SOME)))
    assert chosen
    assert _wrong(chosen, tmp_path) == []


@pytest.mark.faults
@pytest.mark.limit(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_each_kind(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert _wrong(_faults(kind, tmp_path_factory.mktemp("shared")), tmp_path) == []
