"""``make bench``: it runs, a group that fails loses no other, and the table says what is missed and who is faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import all as runner
from benchmarks.budgeted import Budget, Figure, figures_of
from benchmarks.growth import Growth
from benchmarks.pairs import LEAST, measure
from benchmarks.table import Measured, as_json, as_page, faster, missed

WHERE = {"date": "2026-01-01", "processor": "one", "cores": 2, "load": 0.1, "python": "3.11", "system": "Linux"}


def made(budgets: list[Budget], **seconds: list[float]) -> list[Figure]:
    return figures_of("a pass", "64 rows", "ours", {name: np.array(rows) for name, rows in seconds.items()}, budgets)


def test_a_quick_run_of_a_group_writes_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "environments", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    (group,) = found["groups"]
    assert {"KnownValue", "CueCorners", "KeyDoor"} <= {figure["case"] for figure in group["figures"]}
    for figure in group["figures"]:
        ratio = figure["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert figure["pairs"] == runner.QUICK
    assert found["versions"]["torch"]
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## Environments" in page
    assert str(tmp_path) not in page + json.dumps(found)
    assert "KnownValue" in capsys.readouterr().out


def test_a_group_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(rounds: int) -> Iterator[Figure]:
        yield from made([Budget("by hand")], **{"ours": [1.0] * rounds, "by hand": [2.0] * rounds})
        raise ValueError("no room\nand more")

    def holds(rounds: int) -> Iterator[Figure]:
        yield from made([Budget("by hand")], **{"ours": [3.0] * rounds, "by hand": [2.0] * rounds})

    groups = {name: runner.Group(name, "pairs", one, 5, 1) for name, one in (("fails", fails), ("holds", holds))}
    monkeypatch.setattr(runner, "GROUPS", groups)
    assert runner.main(["--out", str(tmp_path)]) == 1
    first, second = json.loads((tmp_path / "benchmarks.json").read_text())["groups"]
    assert first["failed"] == "ValueError: no room"
    assert [figure["ratio"]["median"] for figure in first["figures"] + second["figures"]] == [0.5, 1.5]
    assert not second["failed"]
    assert "fails failed: ValueError: no room" in capsys.readouterr().err
    assert "ended early: ValueError: no room" in (tmp_path / "benchmarks.md").read_text()


def test_what_is_missed_and_who_is_faster_is_said() -> None:
    budgets = [Budget("by hand", 1.2), Budget("captum over it", 1.0), Budget("tdhook"), Budget("absent", 0.1)]
    figures = made(
        budgets,
        **{
            "ours": [1.5, 1.5, 1.5],
            "by hand": [1.0, 1.0, 1.0],
            "captum over it": [3.0, 3.0, 3.0],
            "tdhook": [1.0, 1.2, 1.1],
        },
    )
    group = Measured("calls", "Calls", "python -m benchmarks.calls", figures)
    assert [(figure.against, figure.met) for figure in figures] == [
        ("by hand", False),
        ("captum over it", True),
        ("tdhook", None),
    ]
    assert [figure.against for figure in missed([group])] == ["by hand"]
    assert [figure.against for figure in faster([group])] == ["tdhook"]  # by hand is no peer
    page = as_page([group], WHERE).replace("&nbsp;", " ")
    section = page.split("## Budgets that are missed")[1].split("##")[0]
    assert "ours / by hand | 1.5 [1.5, 1.5] | at most 1.2" in section
    behind = page.split("## Where others are faster")[1].split("\n## ")[0]
    assert "ours / tdhook" in behind
    assert "captum" not in behind
    assert as_json([group], WHERE)["groups"][0]["figures"][0]["medians"] == (1500.0, 1000.0)
    assert "None." in as_page([], WHERE)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_an_exponent_is_that_of_the_power(exponent: float) -> None:
    sizes, paces = (8, 32, 128), np.array([1.0, 3.0, 2.0])
    growth = Growth.fitted("rows", "a pass", {size: paces * size**exponent for size in sizes})
    for found in (growth.exponent, growth.last):
        assert (found.low, found.median, found.high) == pytest.approx((exponent,) * 3, abs=1e-9)
    fixed = Growth.fitted("rows", "a pass", {size: paces * (100 + size) for size in sizes})
    assert fixed.exponent.median < fixed.last.median < 1  # what every call costs weighs less in the end


def test_rounds_end_with_the_time_but_not_before_the_least() -> None:
    def work() -> None:
        sum(range(20_000))

    assert len(measure({"one": work}, rounds=30, within=0.0)["one"]) == LEAST
    assert len(measure({"one": work}, rounds=7, within=60.0)["one"]) == 7
    assert len(measure({"one": work}, rounds=2, within=0.0)["one"]) == 2


def test_every_benchmark_with_figures_is_run() -> None:
    folder = Path(runner.__file__).parent
    named = {path.stem for path in folder.glob("*.py") if "\ndef figures(" in path.read_text()}
    assert named - {"on_device"} == {group.module for group in runner.GROUPS.values()}  # that one needs a GPU
