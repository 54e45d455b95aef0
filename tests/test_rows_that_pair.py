"""Modules that run on some rows only: what is put in from elsewhere belongs to the same row, or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationPatching, SteeringVectors
from tdhook_rl.errors import InputError
from tdhook_rl.latent import StateSubtraction
from tdhook_rl.method import Method
from tdhook_rl.weights import Adapters


class Experts(nn.Module):
    """Hands each row to one of two networks, by its first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, first = x.reshape(-1, 3), x.reshape(-1, 3)[:, 0] > 0
        hidden = rows.new_zeros(len(rows), 4)
        for chosen, network in ((first, self.one), (~first, self.two)):
            if bool(chosen.any()):
                hidden = hidden.index_put((chosen,), network(rows[chosen]))
        return self.head(hidden).reshape(*x.shape[:-1], 1)


def rows(*first: int) -> Tensor:
    return torch.cat([torch.tensor(first)[:, None], torch.randn(len(first), 2)], -1)


#: Where the first network runs: on one row less, on as many others, on one more, on a single one that would spread.
OTHERS = {"fewer": (1, -1, -1, -1), "others": (-1, 1, 1, -1), "more": (1, 1, 1, -1), "the same": (1, 1, -1, -1)}
METHODS: dict[str, Callable[[], Method]] = {
    "subtraction": lambda: StateSubtraction("one", lambda given: given.set("input", given["other"])),
    "patching": lambda: ActivationPatching("one"),
    "patch_fn": lambda: ActivationPatching("one", lambda key, value, first: first),
    "adapter": lambda: Adapters({"name": (lambda value: value * 2, "one", "two")}),
    "vectors by row": lambda: SteeringVectors({"one": "vectors"}),
}


@pytest.mark.parametrize("batch", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", METHODS)
def test_rows_of_other_states_are_not_put_in(name: str, other: str, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    here, there = (rows(*one).reshape(*batch, 3) for one in ((1, 1, -1, -1), OTHERS[other]))
    data = TensorDict(
        {"input": here, "other": there, ("patched", "input"): there, "vectors": torch.randn(*batch, 4)}, batch
    )
    with METHODS[name]().prepare(Experts()) as hooked, pytest.raises(InputError, match=r"'(one|two)'.* batch shape"):
        hooked(data)


@pytest.mark.parametrize("batch", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_modules_that_run_on_all_rows_are_changed_as_before(name: str, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    here, there = (rows(1, 1, 1, 1).reshape(*batch, 3) for _ in range(2))
    data = TensorDict(
        {"input": here, "other": there, ("patched", "input"): there, "vectors": torch.randn(*batch, 4)}, batch
    )
    if name == "adapter":
        return  # the other network does not run then
    policy = Experts()
    with METHODS[name]().prepare(policy) as hooked:
        found = hooked(data)
    expected = {
        "subtraction": policy(there), "vectors by row": policy.head(policy.one(here) + data["vectors"])
    }.get(name, policy(here))  # fmt: skip
    torch.testing.assert_close(found["patched", "output"] if "patch" in name else found["output"], expected)
