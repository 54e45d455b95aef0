"""The control on the raw observation is of all that a policy observes: what is in any input was not computed by it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching
from tdhook_rl.errors import MissingKeyError
from tdhook_rl.replay import probe_grid
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import GroupSplit, OnlineProbe, ProbeSuite

SITE, SPLIT = "module.net", GroupSplit("episode")
INPUTS: list[NestedKey] = ["joints", ("state", "goal"), "counts"]


class Net(nn.Module):
    """Reads several inputs, and a memory that it writes again; of counts it sees nothing."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.net = nn.Linear(3 * inputs + 2, 4)

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        *seen, memory = given
        out = torch.tanh(self.net(torch.cat([*(one.float().flatten(-1)[..., :3] for one in seen), memory], -1)))
        return out, memory + 1


def policy(order: tuple[NestedKey, ...]) -> TensorDictModule:
    torch.manual_seed(0)
    keys = [*order, "memory"]
    return TensorDictModule(Net(len(order)), in_keys=keys, out_keys=["out", ("next", "memory")])


def batch(rows: int = 400) -> TensorDict:
    values = {
        "joints": torch.randn(rows, 3), "state": {"goal": torch.randn(rows, 3).double()},
        "counts": torch.randint(0, 9, (rows, 3)), "memory": torch.randn(rows, 2), "episode": torch.arange(rows) // 4,
    }  # fmt: skip
    return TensorDict(values, batch_size=rows)


def label(key: NestedKey) -> object:
    return lambda data: data[key].double().sum(-1)


ORDERS = [*itertools.permutations(INPUTS)][::2]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_what_is_in_any_input_is_read_of_the_raw_observation(order: tuple[NestedKey, ...], tmp_path: Path) -> None:
    torch.manual_seed(1)
    own, data = policy(order), batch()
    concepts = {str(key): label(key) for key in (*INPUTS, "memory")}
    options = {"sites": [SITE], "concepts": concepts, "split": SPLIT}
    suite = ProbeSuite(own, **options)
    suite.update(data)
    for table in (suite.table(), probe_grid(own, data, **options)):
        for key in INPUTS:
            assert table[SITE, str(key)].input.estimate > 0.99
        assert table[SITE, "memory"].input.estimate < 0.1  # what it has written itself
    named = probe_grid(own, data, **options, input_key=["joints", "counts"])
    assert [named[SITE, str(key)].input.estimate > 0.9 for key in INPUTS] == [True, False, True]
    with pytest.raises(MissingKeyError, match="nothing"):
        probe_grid(own, data, **options, input_key=["joints", "nothing"])
    probes = {
        f"p{at}": OnlineProbe(features=("cache", SITE), label=label(key), split=SPLIT, kind="ridge")
        for at, key in enumerate(INPUTS)
    }
    with ActivationCaching(SITE).prepare(own) as hooked, Monitor(hooked, tmp_path / "run", probes=probes) as monitor:
        monitor.step(hooked(data.clone()))
        assert all("all inputs" not in str(key) for key in data.keys(True, True))
    logged = FileSink.read(tmp_path / "run" / "log.csv")
    assert all(logged[f"probe.p{at}.r2.input"][-1][1] > 0.99 for at in range(len(INPUTS)))
