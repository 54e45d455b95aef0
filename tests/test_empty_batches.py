"""No rows at all: every method gives results of no rows, of the shapes that rows have, or says so."""

from __future__ import annotations

from typing import Any

import pytest
from tensordict import TensorDictBase

from tdhook_rl.errors import TdhookError
from tests.method_table import METHODS, pairs
from tests.policies import CASES

POLICIES = {name: CASES[name] for name in ("categorical", "relu", "actor_value", "pixels") if name in CASES}


def entries(data: TensorDictBase, dims: int) -> dict[Any, tuple]:
    """The dtype and the shape behind the batch of each entry."""
    return {key: (value.dtype, value.shape[dims:]) for key, value in data.items(True, True) if hasattr(value, "shape")}


@pytest.mark.parametrize("annotate", [False, True])
@pytest.mark.parametrize(("method", "policy"), pairs(POLICIES))
def test_no_rows(method: str, policy: str, annotate: bool) -> None:
    row, case = METHODS[method], POLICIES[policy]
    plain = case.build()
    for batch in ((0,), (2, 0)):
        with row.make(case).prepare(plain) as hooked:
            call = hooked.annotate if annotate else hooked
            some, none = (row.data(case, *size) for size in ([3] * len(batch), batch))
            if annotate:  # what was collected holds actions
                some, none = plain(some), plain(none)
            hooked.annotate(plain(some.clone()), on_mismatch="ignore")
            expected = entries(call(some), len(batch))
            told = None
            try:
                found = call(none)
            except TdhookError as error:
                told = str(error)
            if told is not None:
                assert "row" in told
                continue
            assert found.batch_size == batch
            assert entries(found, len(batch)) == expected
