"""The cells of docs/compatibility.md, and that the page is of the rows that there are."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from tests.matrix import COLUMNS, LIMIT, PAGE, cells, in_process, policies, table
from tests.matrix_rows import ROWS

wide = [pytest.mark.matrix, pytest.mark.slow, pytest.mark.limit(LIMIT + 30)]
REFUSED = ("loses its batch", "takes weights and nothing else")


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=wide) for row in ROWS])
def test_row(row) -> None:
    if row.needs is not None and find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed: pip install 'tdhook_rl[{row.needs}]'")
    found = in_process("row", row.name)
    assert set(found) == set(COLUMNS), found
    for column, outcome in found.items():
        word, _, reason = outcome.partition(": ")
        if column in row.lacks:
            assert word == "-"
        elif word == "refused":
            assert column == "live controls", outcome
            assert any(one in reason for one in REFUSED), reason
        else:
            assert outcome == "ok", (column, outcome)


def test_the_page_has_every_row_and_nothing_that_is_wrong() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ", text, flags=re.MULTILINE)
    assert [" / ".join(row) for row in rows if row[0] not in ("collector", "---", "policy") and row[0][0] != "`"] == [
        row.name for row in ROWS
    ]
    assert {row[0].strip("`") for row in rows if row[0].startswith("`")} == set(policies())
    assert "wrong" not in text
    assert "not run" not in text


def test_cells_and_tables() -> None:
    notes: list[str] = []
    found = {"a": "ok", "b": "refused: say  why", "c": "-: never there", "d": "refused: say why"}
    assert cells(found, "abcde", notes) == [
        "ok", "refused [1](#notes)", "— [2](#notes)", "refused [1](#notes)", "not run"
    ]  # fmt: skip
    assert notes == ["say why", "never there"]
    assert cells({"": "wrong: not over after 3 s"}, "ab", notes) == ["wrong [3](#notes)"] * 2
    assert table(["x"], [["1"]]) == "| x |\n| --- |\n| 1 |\n"
