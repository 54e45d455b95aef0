"""Counts, places and shares may be numbers of NumPy, as indices and results of it are: the same comes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.attribution import DimsConfig, windows
from tdhook_rl.errors import InputError
from tdhook_rl.latent import UnitValues
from tdhook_rl.sweeps import ablate_units, attribution_patching, patch_sites, patch_units
from tdhook_rl.weights import Pruning, TaskVectors


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def states(seed: int) -> TensorDict:
    return TensorDict({"input": torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))}, 8)


PAIR: dict[str, Any] = {"clean": states(1), "corrupt": states(2), "sites": "1", "metric": "output"}


def zeros(method: Any) -> list[list[bool]]:
    with method.prepare(net()) as hooked:
        return [(one == 0).flatten().tolist() for one in hooked.parameters()]


def acting(method: Any) -> Tensor:
    with method.prepare(net()) as hooked:
        return hooked(states(1))["output"]


def added(share: Any, chosen: bool) -> Tensor:
    policy = net()
    other = {name: one * 2 for name, one in policy.state_dict().items()}
    with TaskVectors(alphas=(share,), get_test_accuracy=lambda hooked: 1.0).prepare(policy) as hooked:
        vector = hooked.get_task_vector(other)
        with hooked.with_applied_vectors(vector, **({} if chosen else {"alpha": share})):
            return hooked(states(1))["output"]


COUNTS: dict[str, Callable[[Any], Any]] = {
    "compare": lambda n: attribution_patching(net(), **PAIR, compare=n).changes.nan_to_num(9.0).tolist(),
    "parts": lambda n: patch_units(net(), **PAIR, parts={"1": n}).changes.tolist(),
    "units": lambda n: patch_sites(net(), **PAIR, units=n // n, rank=n, controls=n)[0].shares.tolist(),
    "a component": lambda n: patch_units(net(), **PAIR)["1", n].share,
    "a row": lambda n: patch_units(net(), **PAIR)[n].unit,
    "a row of ablation": lambda n: ablate_units(net(), states(1), "1", metric="output")[n].unit,
    "a row of patches": lambda n: patch_sites(net(), **PAIR)[n - n].site,
    "unit values": lambda n: acting(UnitValues({"1": [n]})).tolist(),
    "values by unit": lambda n: acting(UnitValues({"1": {n: 0.5}})).tolist(),
    "pruned weights": lambda n: zeros(Pruning(amount_to_prune=n)),
    "pruned slices": lambda n: zeros(Pruning(modules_to_prune={"0": (n - n, n)})),
    "dimensions": lambda n: DimsConfig(n, (n,)),
    "windows": lambda n: windows([n * 2], [n], [n]),
}
SHARES: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda x: zeros(Pruning(amount_to_prune=x)),
    "pruned slices": lambda x: zeros(Pruning(modules_to_prune={"0": (0, x)})),
    "a strength": lambda x: added(x, False).tolist(),
    "strengths": lambda x: added(x, True).tolist(),
}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8], ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_python(name: str, kind: Any) -> None:
    assert COUNTS[name](kind(2)) == COUNTS[name](2)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16], ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", SHARES)
def test_shares_are_those_of_python(name: str, kind: Any) -> None:
    assert SHARES[name](kind(0.5)) == SHARES[name](0.5)


def test_strengths_of_task_vectors_may_be_tensors() -> None:
    assert added(torch.tensor(0.5), True).tolist() == added(0.5, True).tolist()
    assert TaskVectors(alphas=torch.linspace(0, 1, 3)).alphas == (0.0, 0.5, 1.0)
    for wrong in (float("nan"), "much", torch.ones(2)):
        with pytest.raises(InputError, match="alpha"):
            TaskVectors(alphas=(wrong,))  # type: ignore[arg-type]
    for flag in (True, np.bool_(True)):
        with pytest.raises(InputError, match="amount_to_prune"):
            Pruning(amount_to_prune=flag)
