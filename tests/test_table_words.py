"""Tables say in words why a figure has no limits: in their records, wherever these go, and where they are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.replay import probe_grid
from tdhook_rl.rollout import GroupSplit, ProbeSuite
from tdhook_rl.statistics.cells import Cells
from tdhook_rl.sweeps import ablate_units, attribution_patching, patch_sites, patch_units, steering_sweep


def states(rows: int) -> tuple[nn.Module, TensorDict, TensorDict]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    clean, corrupt = (TensorDict({"input": torch.randn(rows, 3)}, batch_size=rows) for _ in range(2))
    return net, clean, corrupt


def output(outputs: TensorDict) -> torch.Tensor:
    return outputs["output"][..., 0]


def probes(rows: int) -> Any:
    """Of a label that never changes, and of one in few held-out groups."""
    data = CueCorners(batch_size=[2 + 6 * rows], seed=0).rollout(5, make_actor(), break_when_any_done=False)
    data["always"] = torch.ones(data.batch_size, dtype=torch.bool)
    data["level"] = torch.full(data.batch_size, 3.3)
    data["row"] = torch.arange(len(data))[:, None].expand(data.batch_size)
    suite = ProbeSuite(
        make_actor(), sites=[FC2], split=GroupSplit("row"),
        concepts={"always": "always", "level": "level", "xor": ("concept", "xor")},
    )  # fmt: skip
    suite.update(data)
    return suite.table()


def sweep(episodes: int) -> Any:
    actor = make_actor()
    vector = SteeringVector(vector=torch.ones(64), path=FC2)
    env = CueCorners(batch_size=[episodes], seed=0)
    return steering_sweep(actor, env, [vector], alphas=[1.0], controls=0, episodes=episodes, progress=False).table()


TABLES: dict[str, Callable[[int], Any]] = {
    "units estimated": lambda rows: attribution_patching(*states(rows), "1", metric=output, compare="all"),
    "units measured": lambda rows: patch_units(*states(rows), "1", metric=output),
    "sites": lambda rows: patch_sites(*states(rows), ["0", "1"], metric=output),
    "ablation": lambda rows: ablate_units(*states(rows)[:2], ["1"], metric=output),
    "probes": probes,
    "sweep": sweep,
}


def test_every_kind_of_table_is_here() -> None:
    kinds = {type(make(2)) for make in TABLES.values()}
    assert kinds == set(Cells.__subclasses__())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_what_has_no_limits_says_why(name: str, rows: int) -> None:
    table = TABLES[name](rows)
    lacking = [row for row in table.records() if any(key.endswith("_low") and math.isnan(row[key]) for key in row)]
    assert lacking or rows > 1
    assert all(row["words"] for row in lacking), lacking
    assert [cell.numbers()["words"] for cell in table] == [row["words"] for row in table.records()]
    assert [row["words"] for row in json.loads(table.json())] == [row["words"] for row in table.records()]
    for row in lacking:
        assert any(words in str(table) for words in row["words"].split("; ")), str(table)


def test_a_cell_of_several_checkpoints_is_asked_for_by_its_own() -> None:
    """The first of them would be taken for the only one."""
    net, clean, corrupt = states(30)
    checkpoints = {"first": net, "last": {name: -value for name, value in net.state_dict().items()}}
    patched = patch_sites(net, clean, corrupt, ["0"], metric=output, checkpoints=checkpoints)
    rows = clean.set("label", clean["input"][:, 0] > 0).set("row", torch.arange(30))
    options: dict[str, Any] = {"split": GroupSplit("row", held_out=0.5), "untrained": False, "min_rows": 1}
    policy = TensorDictModule(net, ["input"], ["output"])
    checkpoints = {"first": policy, "last": {name: -value for name, value in policy.state_dict().items()}}
    probed = probe_grid(policy, rows, sites="module.0", concepts={"it": "label"}, checkpoints=checkpoints, **options)
    for table, keys in ((patched, ["0", ("0", "all")]), (probed, [("module.0", "it"), ("it",)])):
        for key in keys:
            with pytest.raises(InputError, match=r"the table has 2 cells of .*: name one, \('first', .*, \('last', "):
                table[key]
        site, what = keys[-1] if table is patched else keys[0]
        assert [table[name, site, what].checkpoint for name in checkpoints] == ["first", "last"]
    single = patch_sites(net, clean, corrupt, ["0"], metric=output)
    assert single["0"] is single["0", "all"] is single[0]
