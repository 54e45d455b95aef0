"""Parquet files as what is analysed: the same results as from a buffer's folder, and what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArgumentError, ArtifactError, MissingKeyError, TdhookError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, episodes, in_order, load_results, returns, to_parquet

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet is neither written nor read here")
import pyarrow.parquet as pq  # noqa: E402

ENVS, STEPS = 3, 40
ROWS = ENVS * STEPS
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))


def actor() -> Any:
    torch.manual_seed(0)
    return make_actor()


@pytest.fixture(scope="module")
def data() -> TensorDict:
    found = CueCorners(batch_size=[ENVS], seed=0).rollout(STEPS, actor(), break_when_any_done=False).detach()
    found["collector", "traj_ids"] = torch.arange(ENVS)[:, None].expand(ENVS, STEPS).clone()
    return found.reshape(-1)


@pytest.fixture(scope="module")
def saved(data: TensorDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS), batch_size=4)
    buffer.extend(data)
    buffer.dumps(folder := tmp_path_factory.mktemp("saved"))
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return analysed(saved, tmp_path_factory.mktemp("expected") / "results")


def analysed(source: Any, folder: Path, **options: Any) -> Path:
    with METHOD.prepare(actor()) as policy:
        analyze(policy, source, folder, batch_size=16, progress=False, **options)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*.memmap")}


# ------------------------------------------------------------------ the same rows


def lists(data: TensorDict, rows: slice = slice(None)) -> Any:
    """As other libraries write rows: plain columns, and lists of numbers."""
    columns = {".".join(key): data[key][rows].reshape(len(data[key][rows]), -1).numpy() for key in [
        ("observation",), ("action",), ("logits",), ("next", "reward"), ("next", "done"), ("collector", "traj_ids"),
    ]}  # fmt: skip
    return pa.table({name: [*one] if one.shape[1] > 1 else one[:, 0] for name, one in columns.items()})


def plain(data: TensorDict, at: Path, **options: Any) -> Path:
    pq.write_table(lists(data), path := at / "rows.parquet", **options)
    return path


def by_pandas(data: TensorDict, at: Path) -> Path:
    frame = lists(data).to_pandas()
    frame["environment"] = "corners"
    frame.to_parquet(path := at / "frame.parquet")
    return path


def several(data: TensorDict, at: Path) -> Path:
    (folder := at / "parts").mkdir()
    for number in range(12):  # the tenth comes after the ninth
        pq.write_table(lists(data, slice(10 * number, 10 * number + 10)), folder / f"part.{number}.parquet")
    return folder


def exported(data: TensorDict, at: Path, name: str = "", chunk: int = 16384) -> Path:
    nothing = TensorDict({"attr": {"other": torch.zeros(ROWS)}}, [ROWS])
    keys = ["observation", "action", "logits", ("next", "reward"), ("next", "done"), ("collector", "traj_ids")]
    return to_parquet(nothing, at / f"set{name}", data, keys, chunk=chunk)


KINDS: dict[str, Callable[[TensorDict, Path], Path]] = {
    "columns of lists": plain,
    "row groups of 7": lambda data, at: plain(data, at, row_group_size=7),
    "a frame of pandas": by_pandas,
    "several files": several,
    "a data set of LeRobot's": exported,
    "one in chunks": lambda data, at: exported(data, at, chunk=50),
    "one file of results": lambda data, at: exported(data, at, ".parquet"),
}


@pytest.mark.filterwarnings("ignore:of .* the columns 'environment' hold no numbers:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_buffer(
    kind: str, data: TensorDict, saved: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdhook_rl.reading.parquet_rows._PIECE", 11)  # pieces end inside of chunks
    source = KINDS[kind](data, tmp_path)

    def stop(done: int, size: int) -> None:
        assert size == ROWS
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), METHOD.prepare(actor()) as policy:
        analyze(policy, source, tmp_path / "all", batch_size=16, progress=stop)
    assert content(analysed(source, tmp_path / "all")) == content(expected)
    load_results(tmp_path / "all", verify=True)
    some = {"rows": [3, 100, 4, 70, 71], "fraction": 0.6}
    found = [analysed(one, tmp_path / str(place), **some) for place, one in enumerate([source, saved])]
    assert content(found[0]) == content(found[1])
    read = torch.cat([batch["observation"] for _, batch in in_order(source, 50, start=20)])
    assert torch.equal(read, data["observation"][20:])


@pytest.mark.parametrize("kind", ["columns of lists", "a data set of LeRobot's"])
def test_episodes_are_known(kind: str, data: TensorDict, tmp_path: Path) -> None:
    source = KINDS[kind](data, tmp_path)
    assert returns(source).mean().estimate == returns(data).mean().estimate
    worst = [episodes(one, order="worst", k=1)[0].rows for one in (source, data)]
    assert torch.equal(*worst)


def test_the_command_reads_them(data: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exported(data, tmp_path)
    assert main(["analyze", "set", "--on-mismatch", "ignore", "--out", "out"]) == 0
    assert len(load_results("out")) == ROWS
    assert "Return of the episodes" in (tmp_path / "out" / "report.html").read_text()


def test_a_group_of_any_size_is_read_in_pieces(tmp_path: Path) -> None:
    count, width = 100_000, 64
    values = np.random.default_rng(0).random((count, width), dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    pq.write_table(pa.table({"observation": column}), tmp_path / "big.parquet", row_group_size=count)
    del column
    before = most = pa.total_allocated_bytes()
    for first, batch in in_order(tmp_path / "big.parquet", 8192):
        assert np.array_equal(batch["observation"].numpy(), values[first : first + len(batch)])
        most = max(most, pa.total_allocated_bytes())
    assert most - before < values.nbytes / 2


# ------------------------------------------------------------------ what cannot be read


def _with(**columns: Any) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        pq.write_table(pa.table(columns), at / "x.parquet")
        return at / "x.parquet"

    return make


def _set(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        rows = TensorDict({"observation": torch.rand(8, 90), "next": {"done": torch.ones(8, 1) > 0}}, [8])
        change(found := to_parquet(TensorDict({"attr": {"x": torch.zeros(8)}}, [8]), at / "set", rows))
        return found

    return make


def _parts(*tables: dict[str, Any]) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        for number, one in enumerate(tables):
            pq.write_table(pa.table(one), at / f"{number}.parquet")
        return at

    return make


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _blank(path: Path) -> None:
    """The pages of a file become zeros; what it says of them stays."""
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])


def _says(path: Path, **facts: Any) -> None:
    info = path / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | facts))


DATA = "data/chunk-000/file-000.parquet"
WIDE = [[0.0] * 90] * 4
REFUSED: dict[str, tuple[Callable[[Path], Path], type[TdhookError], str]] = {
    "no such file": (lambda at: at / "x.parquet", ArtifactError, "cannot read .*x.parquet"),
    "no rows": (_with(observation=pa.array([], pa.list_(pa.float32()))), ArtifactError, "has no rows"),
    "a missing column": (_with(observations=WIDE), MissingKeyError, "'observation'.*nearest.*'observations'"),
    "a cut file": (_set(lambda at: _cut(at / DATA)), ArtifactError, "cannot read .*file-000.parquet"),
    "damaged pages": (_set(lambda at: _blank(at / DATA)), ArtifactError, "cannot read .*file-000.parquet"),
    "a missing file": (_set(lambda at: _says(at, total_frames=12)), ArtifactError, "12 rows, and the files .* have 8"),
    "no value": (_with(observation=[*WIDE, None]), ArtifactError, "cannot read|1 rows without a value"),
    "no value in a list": (_with(observation=[*WIDE, [None] * 90]), ArtifactError, "without a value"),
    "ragged rows": (_with(observation=[[0.0], [0.0] * 3]), ArtifactError, "'observation' differ in length: .* 1, 3"),
    "longer rows in another file": (_parts({"observation": WIDE}, {"observation": [[0.0]]}), ArtifactError,
                                    r"differ in length: in .*1.parquet they are of shape \(1,\) from row 4"),
    "another column in another file": (_parts({"observation": WIDE}, {"observations": WIDE}), ArtifactError,
                                       "1.parquet has another column 'observation'"),
    "text in another file": (_parts({"observation": WIDE}, {"observation": ["a"]}), ArtifactError, "another column"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    make, error, message = REFUSED[kind]
    source = make(tmp_path)
    with pytest.raises(error, match=message), Saliency().prepare(actor()) as policy:
        analyze(policy, source, tmp_path / "out", progress=False)


def test_text_is_left_out_aloud(tmp_path: Path) -> None:
    source = _with(observation=WIDE, task=["a", "b", "c", "d"])(tmp_path)
    with pytest.warns(UserWarning, match="'task' hold no numbers, and are left out"):
        _, found = next(iter(in_order(source)))
    assert list(found.keys()) == ["observation"]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _with(observation=WIDE)(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ArgumentError, match=r"pip install 'tdhook_rl\[parquet\]'"):
        next(iter(in_order(source)))
