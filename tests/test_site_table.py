"""The table of modules: paths, shapes, runs; from a policy, on the command line, and in the doctor's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, HookedModule, SteeringVectors
from tdhook_rl.cli import main
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent.probing import Probing
from tests.policies import CASES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), self.act), nn.Sequential(nn.Linear(4, 4), self.act)]
        )
        self.conv, self.core, self.never = nn.Conv1d(1, 6, 3), nn.GRU(3, 5), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        self.conv(self.norm(x)[:, None])
        return self.core(x[:, :3].expand(7, *x.shape[:1], 3))[0][-1]


@pytest.mark.parametrize("rows", [7, 3])
def test_paths_shapes_and_runs(rows: int) -> None:
    net, data = Net(), TensorDict({"input": torch.randn(rows, 4)}, [rows])
    hooked = HookedModule.from_module(net)
    state, statistics = torch.get_rng_state(), net.norm.running_mean.clone()
    table = hooked.sites(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.norm.running_mean, statistics)
    assert (net.calls, hooked.module.calls, list(data.keys())) == (0, 0, ["input"])
    assert table["act"].runs == 2
    assert table["blocks.1.1"].same_as == "act"
    assert table["blocks.1"].features == (4,)
    assert table["conv"].features == (6, 2)
    assert table["core"].features == (7, 5)
    assert (table["never"].runs, table["never"].features) == (0, None)
    assert "blocks" not in {row.path for row in table}
    assert "'act@0', 'act@1', 'act@all'" in str(table)
    assert len(table.head(3)) == 3
    # Every path of the table is one that methods take.
    ran = [row.path for row in table if row.runs]
    with ActivationCaching(ran).prepare(net) as policy:
        found = policy(data)["cache"]
    assert {path: tuple(found[path].shape[1:]) for path in ran} == {path: table[path].features for path in ran}
    with pytest.raises(SiteError, match=r"nearest: 'blocks\.1\.0'"):
        table["blocks.1.0.linear"]


@pytest.mark.parametrize("name", CASES)
def test_every_policy_has_one(name: str) -> None:
    case = CASES[name]
    seen: list[str] = []

    class Keep:
        def __init__(self, key: str, direction: str) -> None:
            pass

        def step(self, activation: Tensor) -> None:
            seen.append("step")

    with Probing(case.site, Keep).prepare(case.build()) as hooked:
        table = hooked.sites(case.data(5))
        assert not seen
        row = table[case.site]
        assert row.runs == 1
        assert row.features is not None
        assert hooked.sites()[case.site].runs is None
        with pytest.raises(InputError, match="a list"):
            hooked.sites([1.0])


def setup() -> tuple[nn.Module, TensorDict]:
    return Net(), TensorDict({"input": torch.zeros(7, 4)}, [7])


def policy() -> Any:
    return SteeringVectors({"act": torch.ones(4)}).prepare(Net())


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main(["sites", "tests.test_site_table:setup"]) == 0
    shown = capsys.readouterr().out
    assert "7 x 5" in shown
    assert "'act@all'" in shown
    assert main(["sites", "tests.test_site_table:policy"]) == 0
    assert "blocks.0.1" in capsys.readouterr().out
    assert main(["sites"]) == 0
    assert "module.0.module.3" in capsys.readouterr().out
