"""The table of oracles: this library is right in every row, and what peers give is said as it is."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import comparison
from benchmarks.comparison import Case, Row, compare
from benchmarks.oracle_table import main, rows
from tests.method_table import METHODS

FLOAT32 = {"Saliency of bytes (uint8 pixels)", "OnlineProbe, ridge on streamed and merged statistics"}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.method)
def test_every_row_is_right(row: Row) -> None:
    error = compare(row.make, seeds=1, names=["ours"])["ours"].error
    assert error is not None
    assert error < (1e-6 if row.method in FLOAT32 else 1e-12)


def test_every_method_has_an_oracle_and_every_oracle_its_method() -> None:
    for info in METHODS:
        named = [row for row in rows() if re.match(rf"{info.cls.__name__}\b", row.method)]
        assert named, f"{info.cls.__name__} is held against nothing"
        assert list(info.oracles) == [row for row in rows() if row in named]


def test_outcomes_are_numbers_or_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("attr")

    def outcomes(case: Case) -> list[str]:
        return [str(outcome) for outcome in compare(lambda: case, seeds=2).values()]

    two = torch.tensor([1.0, -4.0])
    monkeypatch.setattr(comparison, "find_spec", lambda name: name)
    assert outcomes(Case(two, lambda: two, lambda: two + 1, fail)) == ["0", "2.5e-01", "raises KeyError"]
    assert outcomes(Case(two, lambda: two, lambda: two[0], "another one")) == ["0", "shape (), not (2,)", "another one"]
    assert outcomes(Case(0.0, lambda: 1e-3)) == ["1.0e-03", "-", "-"]
    with pytest.raises(KeyError):
        outcomes(Case(two, fail))
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    assert outcomes(Case(two, lambda: two, lambda: two, fail)) == ["0", "not installed", "not installed"]


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main("directional", 1)
    heading, rule, line = capsys.readouterr().out.splitlines()
    assert heading.startswith("| method")
    assert set(rule) == {"|", "-", " "}
    assert line.startswith("| DirectionalAblation | a projection matrix |")
