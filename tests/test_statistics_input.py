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


#: By name what no rows have as counts or sums, and what is said of it.
IMPOSSIBLE: dict[str, tuple[Callable[[], Any], str]] = {
    "more right than there are": (
        lambda: statistics.balanced_accuracy([[3, 1], [2, 5]], [[4, 2], [3, 4]]), r"5 of 4 \(group 1, class 1\)"
    ),
    "the two exchanged": (
        lambda: statistics.accuracy_difference([[1, 1]], [[2, 2]], [[4, 2]], [[3, 1]]), "right= comes first, then rows="
    ),
    "scores of other groups": (
        lambda: statistics.accuracy_difference([[1, 1]] * 2, [[2, 2]] * 2, [[1, 1]] * 3, [[2, 2]] * 3),
        "the same groups, got 2 and 3",
    ),
    "rows below 0": (lambda: statistics.r_squared([[-2, 0.0, 4.0, 1.0]] * 3), "-2 rows"),
    "squares below 0": (lambda: statistics.r_squared([[2, 1.0, -4.0, 1.0]] * 3), "of squares -4"),
    "errors below 0": (lambda: statistics.r_squared_difference(*[[[2, 0.0, 4.0, -1.0]] * 3] * 2), "errors -1"),
    "a sum beyond its squares": (lambda: statistics.r_squared([[2, 4.0, 4.0, 1.0]] * 3), "at most rows times"),
    "a probability above 1": (lambda: statistics.holm([0.5, 1.5]), "between 0 and 1"),
    "a negative probability": (lambda: statistics.benjamini_hochberg([-0.1]), "between 0 and 1"),
    "no confidence": (lambda: statistics.r_squared([[2, 0.0, 4.0, 1.0]] * 3, confidence=0.0), "between 0 and 1"),
    "confidence that is none": (lambda: statistics.grouped_mean([1.0, 2.0], confidence=math.nan), "between 0 and 1"),
    "confidence in words": (lambda: statistics.iqm([1.0, 2.0], confidence="95%"), "between 0 and 1"),
    "a null that is none": (lambda: statistics.p_value([1.0, 2.0], null=math.nan), "null= is a number"),
    "no resamples": (lambda: statistics.grouped_mean(np.arange(20.0), resamples=0), "resamples= is a whole number"),
    "few resamples": (lambda: statistics.iqm(np.arange(20.0), resamples=1), "resamples= is a whole number"),
    "half a resample": (
        lambda: statistics.bootstrap(np.median, np.arange(20.0), resamples=99.5), "resamples= is a whole number"
    ),
    "bounds the wrong way": (lambda: statistics.grouped_mean([1.0, 1.0], bounds=(2, 0)), "bounds= are"),
    "bounds of no width": (lambda: statistics.grouped_mean([1.0, 1.0], bounds=(1, 1)), "bounds= are"),
    "bounds that are none": (lambda: statistics.grouped_mean([0.0, 1.0], bounds=(0, math.inf)), "bounds= are"),
    "half a group": (lambda: statistics.minimum_detectable_effect(1.0, 2.5), "groups a whole number"),  # type: ignore[arg-type]
    "a spread that is none": (lambda: statistics.minimum_detectable_effect(math.nan, 5), "not negative"),
    "rows below 0, left out": (lambda: statistics.jackknife(1.0, [1.0, 2.0], rows=-1), "rows= is a number from 0 on"),
    "limits the wrong way": (
        lambda: statistics.Interval(
            estimate=1.0, low=2.0, high=0.0, confidence=0.95, method="t", groups=3, rows=3
        ), "low= is at most high="
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_words(case: str) -> None:
    call, said = IMPOSSIBLE[case]
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-9, 1e9])
def test_what_a_decay_leaves_of_counts_is_taken(scale: float) -> None:
    """Right rows and all rows are decayed in other orders: 1 + 2e-16 of 1 is right."""
    rows = np.full((4, 2), 3.0) * scale
    found = statistics.balanced_accuracy(rows * (1 + 1e-12), rows)
    assert found.estimate == found.high == 1.0
    sums = np.array([[2.0, 3.0, 4.5, 1.0], [2.0, 5.0, 12.5 - 1e-12, 1.0]] * 2) * scale
    assert statistics.r_squared(sums).known


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
