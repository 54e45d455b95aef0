"""The cells of docs/adapters.md: agents of Stable-Baselines3, by what each method gives on them."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from tests.adapter_table import COLUMNS, END, MOST, NEAR, PAGE, ROWS, START, cell

CELLS = [(*row, column) for row, column in product(ROWS, COLUMNS)]
#: Each row and each column at least once; the others are slow ones only because they are many.
QUICK = {(*ROWS[index % len(ROWS)], column) for index, column in enumerate([*COLUMNS, *COLUMNS])}


@pytest.mark.parametrize(
    ("name", "policy", "column"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in CELLS],
)
def test_cells(name: str, policy: str, column: str) -> None:
    found = cell(name, policy, column)
    assert found <= (MOST if column in NEAR else 0.0)


def test_the_page_has_the_table() -> None:
    """With every row and column; ``python -m tests.adapter_table`` writes it."""
    text = PAGE.read_text().split(START)[1].split(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [one.strip() for one in lines[0].split("|")[2:-1]] == list(COLUMNS)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"{name} `{policy}`" for name, policy in ROWS]
    for line in lines[2:]:
        for column, word in zip(COLUMNS, line.split("|")[2:-1], strict=True):
            assert word.strip() == "bit-equal" or (column in NEAR and float(word) <= MOST)
