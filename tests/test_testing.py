"""The conformance kit: it passes right methods, and catches each broken one by the check that is meant for it."""

from __future__ import annotations

import pytest

from tdhook_rl.errors import ConformanceError, InputError
from tdhook_rl.testing import CHECKS, check_method
from tests.broken_methods import BROKEN, Norm


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_caught_by_its_check(name: str) -> None:
    method, check = BROKEN[name]
    with pytest.raises(ConformanceError) as caught:
        check_method(method)
    assert caught.value.check == check, str(caught.value)
    assert str(caught.value).startswith(f"{check}: ")


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
