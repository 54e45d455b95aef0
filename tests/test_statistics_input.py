"""What statistics are given: numbers, counts and groups of all kinds, and what is none of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from tdhook_rl import statistics
from tdhook_rl.errors import InputError

#: By name what is no column of three real numbers.
NO_NUMBERS: dict[str, Any] = {
    "imaginary": np.array([1 + 1j, 2, 3]), "imaginary, of torch": torch.tensor([1 + 1j, 2, 3]),
    "masked": np.ma.array([0.1, 0.2, 0.3], mask=[0, 1, 0]), "times": np.array([1, 2, 3], dtype="timedelta64[s]"),
    "dates": np.array(["2020", "2021", "2022"], dtype="datetime64[Y]"), "without data": torch.zeros(3, device="meta"),
    "ragged": [[0.1], [0.2, 0.3]], "mapping": {"a": 0.1}, "names": ["a", "b", "c"],
}  # fmt: skip
#: By name what takes one column of numbers.
OF_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "grouped_mean": statistics.grouped_mean, "p_value": statistics.p_value, "iqm": statistics.iqm,
    "bootstrap": lambda values: statistics.bootstrap(np.median, values), "holm": statistics.holm,
    "benjamini_hochberg": statistics.benjamini_hochberg,
    "unpaired_difference": lambda values: statistics.unpaired_difference([1.0, 2.0], values),
    "paired_difference": lambda values: statistics.paired_difference(values, [1.0, 2.0, 3.0]),
    "ratio_of_means": lambda values: statistics.ratio_of_means(values, [1.0, 2.0, 3.0]),
    "probability_of_improvement": lambda values: statistics.probability_of_improvement([1.0, 2.0], values),
    "balanced_accuracy": lambda values: statistics.balanced_accuracy(values, values),
    "area_under_curve": lambda values: statistics.area_under_curve(values, values),
    "accuracy_difference": lambda values: statistics.accuracy_difference(values, values, values, values),
    "r_squared": statistics.r_squared,
    "r_squared_difference": lambda values: statistics.r_squared_difference(values, values),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", OF_NUMBERS)
@pytest.mark.parametrize("given", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_name(function: str, given: str) -> None:
    with pytest.raises(InputError, match=r"real numbers|masked values"):
        OF_NUMBERS[function](NO_NUMBERS[given])


@pytest.mark.parametrize("table", [[[math.nan, 1], [1, 1]], [[-1, 1], [1, 1]], [[math.inf, 1], [1, 1]]])
def test_tables_hold_counts(table: list[list[float]]) -> None:
    for function in (
        OF_NUMBERS["balanced_accuracy"],
        OF_NUMBERS["area_under_curve"],
        OF_NUMBERS["accuracy_difference"],
    ):
        with pytest.raises(InputError, match="numbers from 0 on"):
            function(table)


#: By name the groups of three rows, of which the last two are one.
NAMED: dict[str, Any] = {
    "names": ["a", "b", "b"], "of several kinds": ["a", 1, 1], "pairs as text": np.array([b"a", b"b", b"b"]),
    "of half precision": torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16), "large": [2**70, 1, 1],
    "a column": torch.tensor([[0], [1], [1]]), "categories": pandas.Categorical(["a", "b", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("groups", NAMED)
def test_groups_have_names_of_all_kinds(groups: str) -> None:
    expected = statistics.grouped_mean([1.0, 2.0, 3.0], [0, 1, 1])
    assert statistics.grouped_mean([1.0, 2.0, 3.0], NAMED[groups]) == expected


@pytest.mark.parametrize(
    "groups",
    [[0.0, math.nan, math.nan], ["a", None, None], ["a", math.nan, math.nan], torch.tensor([0.0, math.nan, math.nan]),
     np.ma.array([0, 1, 1], mask=[0, 1, 1]), pandas.Series([0, None, None])],
)  # fmt: skip
def test_rows_of_no_group_are_not_a_group(groups: Any) -> None:
    for function in (statistics.grouped_mean, statistics.iqm, statistics.p_value):
        with pytest.raises(InputError, match=r"no group for 2 of 3 rows \(row 1 first\)"):
            function([1.0, 2.0, 3.0], groups)
