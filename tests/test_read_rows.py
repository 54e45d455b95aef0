"""An analysis goes on with the rows that it has read, wherever they are kept, and its policy, and with no others."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import Transform

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.errors import ArtifactError
from tdhook_rl.replay import analyze, load_results, to_parquet
from tests.test_sweep_settings import POLICIES

ROWS = 240
#: Of so many entries none of those that are computed again.
PLACE = 7


class Stop(Exception):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, seen: Tensor, told: Tensor) -> Tensor:
        return self.first(seen).tanh() + self.second(told.float()).tanh()


def rows() -> TensorDict:
    draws = torch.Generator().manual_seed(0)
    return TensorDict(
        {
            "observation": torch.randn(ROWS, 3, generator=draws),
            "agent": {"told": torch.randint(0, 9, (ROWS, 2), generator=draws)},
            "logits": torch.zeros(ROWS, 4),
            "advantage": torch.randn(ROWS, generator=draws),
        },
        [ROWS],
    )


def in_a_buffer(data: TensorDict, folder: Path, ndim: int = 1) -> ReplayBuffer:
    buffer = ReplayBuffer(storage=LazyTensorStorage(ROWS, ndim=ndim))
    buffer.extend(data)
    return buffer


def in_a_folder(data: TensorDict, folder: Path) -> Path:
    buffer = ReplayBuffer(storage=LazyMemmapStorage(ROWS))
    buffer.extend(data)
    path = folder / f"rows{len(list(folder.iterdir()))}"
    buffer.dumps(path)
    return path


def in_a_table(data: TensorDict, folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    path = folder / f"rows{len(list(folder.iterdir()))}.parquet"
    return to_parquet(data, path, chunk=70)


#: What holds the rows.
SOURCES: dict[str, Callable[[TensorDict, Path], Any]] = {
    "a TensorDict": lambda data, folder: data,
    "a buffer": in_a_buffer,
    "a folder": in_a_folder,
    "a table": in_a_table,
    "a list": lambda data, folder: [*data.split(50)],
    "a function": lambda data, folder: lambda: iter(data.split(50)),
    "trajectories": lambda data, folder: data.reshape(60, 4),
    "entries of a buffer": lambda data, folder: in_a_buffer(data.reshape(60, 4), folder),
    "lines": lambda data, folder: in_a_buffer(data.reshape(4, 60), folder, ndim=2),
}


def run(given: Any, folder: Path, stop: bool = False, **options: Any) -> TensorDict:
    def progress(done: int, size: int) -> None:
        if stop and 2 * done >= size:
            raise Stop

    torch.manual_seed(0)
    policy = TensorDictModule(Net(), ["observation", ("agent", "told")], ["logits"])
    with Saliency(target=targets.logit(0), inputs=["observation"]).prepare(policy) as hooked:
        options = {"batch_size": 50, "on_mismatch": "ignore", **options}
        return analyze(hooked, given, folder, progress=progress, **options).clone()


def begun(given: Any, folder: Path, **options: Any) -> None:
    with pytest.raises(Stop):
        run(given, folder, stop=True, **options)


def other(data: TensorDict, key: Any, place: int = PLACE) -> TensorDict:
    found = data.clone()
    found[key][place] = found[key][place] + 1
    return found


def swapped(data: TensorDict) -> TensorDict:
    order = torch.arange(ROWS)
    order[[PLACE, PLACE + 1]] = order[[PLACE + 1, PLACE]]
    return data[order].contiguous()


#: Other rows, and what is said of them.
CHANGED: dict[str, tuple[Callable[[TensorDict], TensorDict], str]] = {
    "an observation": (lambda data: other(data, "observation"), "'observation'"),
    "a nested one": (lambda data: other(data, ("agent", "told")), r"'agent\.told'"),
    "an output": (lambda data: other(data, "logits"), "'logits'"),
    "two rows in another order": (swapped, r"'agent\.told'"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_written_over_is_told(source: str, tmp_path: Path) -> None:
    made, data, folder = SOURCES[source], rows(), tmp_path / "results"
    begun(made(data, tmp_path), folder)
    with pytest.raises(ArtifactError, match=r"'observation' of the rows is not what it was|is not what this policy"):
        run(made(other(data, "observation"), tmp_path), folder)
    if source == "a TensorDict":
        for change, key in CHANGED.values():
            with pytest.raises(ArtifactError, match=f"^{key} of the rows is not what it was"):
                run(change(data), folder)
    found = run(made(other(data, "advantage"), tmp_path), folder, batch_size=33)  # of which no result is
    if source == "a TensorDict":
        assert (run(data, tmp_path / "expected") == found).all()
        assert (load_results(folder, verify=True) == found).all()


@pytest.mark.parametrize("options", [{}, {"rows": slice(3, None, 2)}], ids=str)
def test_a_ring_that_went_on(options: dict[str, Any], tmp_path: Path) -> None:
    """Of the entries that are analysed alone, and only where they are done."""
    buffer = in_a_buffer(rows(), tmp_path)
    buffer.extend(rows()[: PLACE - 1])
    begun(buffer, tmp_path / "results", **options)
    chosen = run(buffer, tmp_path / "all", **options).get("index", torch.arange(ROWS))
    before, last = buffer[:].clone(), int(chosen[-1])
    buffer.extend(rows()[100:102])  # over two of the first ones
    with pytest.raises(ArtifactError, match=r"of the rows is not what it was|is not what this policy"):
        run(buffer, tmp_path / "results", **options)
    unread = torch.ones(ROWS, dtype=torch.bool).index_fill(0, chosen, False)
    buffer[:] = torch.where(unread, before + 1, before)
    buffer[torch.tensor([last])] = before[last : last + 1].apply(lambda one: one + 1)
    run(buffer, tmp_path / "results", **options)  # what was not read yet may be written over


def test_the_same_rows_are_the_same_wherever_they_are(tmp_path: Path) -> None:
    data = rows()
    begun(data, tmp_path / "results")
    for name in ("a buffer", "a folder", "a table", "a list", "a function"):
        run(SOURCES[name](data, tmp_path), tmp_path / "results")


class Mixes(Transform):
    """What it gives has other last digits beside other rows."""

    def __init__(self) -> None:
        super().__init__(in_keys=["seen"], out_keys=["observation"])
        self.weight = torch.linspace(-1, 1, 3 * 300).reshape(300, 3).sin()

    def _apply_transform(self, obs: Tensor) -> Tensor:
        return (obs @ self.weight) * (1 + 1e-6 * len(obs))

    forward = Transform._call


def test_what_a_transform_makes_is_of_the_rows_that_it_reads(tmp_path: Path) -> None:
    data = rows().exclude("observation")
    data["seen"] = torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(0))
    buffer = in_a_buffer(data, tmp_path)
    buffer.append_transform(Mixes())
    begun(buffer, tmp_path / "results")
    run(buffer, tmp_path / "results", batch_size=33)
    buffer.storage["seen"][PLACE] += 1
    with pytest.raises(ArtifactError, match=r"^'seen' of the rows is not what it was"):
        run(buffer, tmp_path / "results")


def test_what_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """It did not say which rows it had read: what is there now is taken for these, and said."""
    begun(rows(), tmp_path / "results")
    path = tmp_path / "results" / "analysis.json"
    manifest = json.loads(path.read_text())
    sums = manifest["facts"].pop("rows")
    assert sums.keys() == {"observation", "agent.told", "logits"}
    path.write_text(json.dumps(manifest))
    run(rows(), tmp_path / "results")
    again = json.loads(path.read_text())["facts"]["rows"]
    run(rows(), tmp_path / "whole", batch_size=7)
    assert json.loads((tmp_path / "whole" / "analysis.json").read_text())["facts"]["rows"] == again


def test_what_the_results_are_beside_may_be_in_the_rows(tmp_path: Path) -> None:
    data: TensorDictBase = rows()
    found = run(data, tmp_path / "results")
    beside = data.clone().update(found)
    assert (run(beside, tmp_path / "results") == found).all()


def explained(policy: nn.Module, folder: Path) -> TensorDict:
    seen = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    with ActivationCaching("module.0.module.0").prepare(policy) as hooked:
        return analyze(hooked, TensorDict({"observation": seen}, [60]), folder).clone()


@pytest.mark.filterwarnings("ignore:.*goes on as the same", "ignore:its forward writes")
@pytest.mark.parametrize("name", POLICIES)
def test_it_goes_on_with_the_same_policy(name: str, tmp_path: Path) -> None:
    """Though what makes it another may not show in the entries that are computed again."""
    make, other_one = POLICIES[name]
    policy = make()
    first = explained(policy, tmp_path)
    policy(TensorDict({"observation": torch.randn(3, 2)}, [3]))  # acting changes a counter, and no setting
    assert (explained(policy, tmp_path) == first).all()
    assert (explained(make(), tmp_path) == first).all()
    with pytest.raises(ArtifactError, match=r"other modules, or options of these, .* and is |other weig|is not what"):
        explained(other_one(), tmp_path)


def test_a_copy_goes_on_where_the_original_is_gone(tmp_path: Path) -> None:
    """As a process does that was sent the hooked policy, or that made it of a policy which it let go."""
    make, _ = POLICIES["bounds as tensors"]
    first = explained(make(), tmp_path)
    seen = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    alone = ActivationCaching("module.0.module.0").prepare(make(), return_context=False)
    for hooked in (alone, pickle.loads(pickle.dumps(alone))):
        assert (analyze(hooked, TensorDict({"observation": seen}, [60]), tmp_path) == first).all()
