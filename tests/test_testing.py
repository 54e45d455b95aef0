"""The conformance kit: it passes right methods, and catches each broken one by the check that is meant for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tdhook_rl.errors import ConformanceError, InputError
from tdhook_rl.testing import CHECKS, check_method
from tests import right_methods
from tests.broken_methods import BROKEN, Norm
from tests.right_methods import RIGHT, with_more

PUBLIC = {"tdhook_rl", "tdhook_rl.method", "tdhook_rl.testing"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_caught_by_its_check(name: str) -> None:
    method, check = BROKEN[name]
    with pytest.raises(ConformanceError) as caught:
        check_method(method)
    assert caught.value.check == check, str(caught.value)
    assert str(caught.value).startswith(f"{check}: ")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_method_passes(name: str) -> None:
    check_method(RIGHT[name], data=with_more)


def test_right_methods_are_written_by_public_imports() -> None:
    tree = ast.parse(Path(right_methods.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("tdhook_rl")} == PUBLIC
    assert len(RIGHT) >= 10


def test_the_same_method_without_a_fault_passes() -> None:
    check_method(Norm)
    assert len(BROKEN) >= 30
    assert {check for _, check in BROKEN.values()} == set(CHECKS)


def test_waivers_have_a_name_and_a_reason() -> None:
    method, check = BROKEN["NeedsARow"]
    check_method(method, waive={check: "there is no maximum without a row"})
    with pytest.raises(InputError, match="no check is named 'empty'; nearest: 'empty_batches'"):
        check_method(method, waive={"empty": "why not"})
    with pytest.raises(InputError, match="gives no reason"):
        check_method(method, waive={check: " "})
