"""Results as Parquet, as a data frame and as a Minari dataset, read back and held to the rows."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArgumentError, ArtifactError, InputError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, frame, load_parquet, returns, to_minari, to_parquet

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet is neither written nor read here")
import pyarrow.parquet as pq  # noqa: E402

ROWS = 120
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))


@pytest.fixture(scope="module")
def data() -> TensorDict:
    torch.manual_seed(0)
    actor = make_actor()
    found = CueCorners(batch_size=[3], seed=0).rollout(40, actor, break_when_any_done=False).detach()
    found["collector", "traj_ids"] = torch.arange(3)[:, None].expand(3, 40).clone()
    return found.reshape(-1)


@pytest.fixture(scope="module")
def results(data: TensorDict, tmp_path_factory: pytest.TempPathFactory) -> TensorDict:
    torch.manual_seed(0)
    with METHOD.prepare(make_actor()) as policy:
        return analyze(policy, data, tmp_path_factory.mktemp("found") / "results", progress=False)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_file_and_back(chunk: int, results: TensorDict, tmp_path: Path) -> None:
    path = to_parquet(results, tmp_path / "found.parquet", chunk=chunk)
    again = load_parquet(path)
    assert (again == results).all()
    for key, value in results.items(True, True):
        assert again[key].dtype == value.dtype
    assert pq.ParquetFile(path).num_row_groups == -(-ROWS // chunk)
    assert list(load_parquet(path, [("attr", "observation")]).keys(True, True)) == [("attr", "observation")]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4)])
def test_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    value = torch.rand(5, *shape).mul(9).to(dtype)
    found = TensorDict({"cache": {"a.b": value, "c": value}}, batch_size=5)
    again = load_parquet(to_parquet(found, tmp_path / "x.parquet", chunk=2))
    assert torch.equal(again["cache", "a.b"], value)
    assert again["cache", "a.b"].dtype == dtype


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_a_data_set_by_episodes(some: bool, data: TensorDict, results: TensorDict, tmp_path: Path) -> None:
    rows = torch.arange(ROWS)
    if some:
        rows = torch.arange(5, 90, 2)
        results = results[rows].set("index", rows)
    path = to_parquet(results, tmp_path / "set", data, fps=10.0, task="reach the corner", chunk=32)
    again = load_parquet(path)
    entries = again["buffer_index"]
    assert entries.sort().values.tolist() == rows.tolist()
    known = returns(data)
    number = known.episode[entries]
    assert (number.diff() >= 0).all()
    place = torch.full((ROWS,), -1)
    place[rows] = torch.arange(len(rows))
    for key in (("attr", "observation"), ("cache", FC2), ("computed", "attr")):
        assert torch.equal(again[key], results[key][place[entries]])
    for key in ("observation", "action", ("next", "reward"), ("next", "done")):
        assert torch.equal(again[key].reshape(len(rows), -1), data[key][entries].reshape(len(rows), -1))
    assert torch.equal(again["index"], torch.arange(len(rows)))
    assert ("next", "observation") not in again.keys(True, True)
    episode, lengths = again["episode_index"].unique_consecutive(return_counts=True)
    assert torch.equal(episode, torch.arange(len(number.unique())))
    frames = torch.cat([torch.arange(int(one)) for one in lengths])
    assert torch.equal(again["frame_index"], frames)
    torch.testing.assert_close(again["timestamp"], frames.float() / 10)
    info = json.loads((path / "meta" / "info.json").read_text())
    assert (info["total_frames"], info["total_episodes"]) == (len(rows), len(episode))
    assert info["features"]["attr.observation"] == {"dtype": "float32", "shape": [90], "names": None}
    assert info["features"]["frame_index"] == {"dtype": "int64", "shape": [1], "names": None}
    written = pq.ParquetFile(path / "data" / "chunk-000" / "file-000.parquet").schema_arrow.names
    assert set(info["features"]) == set(written) >= {"task_index", "timestamp", "index", "buffer_index"}
    stats = json.loads((path / "meta" / "stats.json").read_text())
    attr = results["attr", "observation"].double()
    np.testing.assert_allclose(stats["attr.observation"]["mean"], attr.mean(0), atol=1e-9)
    np.testing.assert_allclose(stats["attr.observation"]["std"], attr.std(0, correction=0), atol=1e-9)
    np.testing.assert_allclose(stats["attr.observation"]["max"], attr.amax(0), atol=1e-9)
    np.testing.assert_allclose(stats["attr.observation"]["min"], attr.amin(0), atol=1e-9)
    assert stats["attr.observation"]["count"] == [len(rows)]
    listed = pq.read_table(path / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pydict()
    assert listed["length"] == lengths.tolist()
    assert listed["dataset_to_index"] == lengths.cumsum(0).tolist()
    # What was written can be analysed again.
    torch.manual_seed(0)
    with METHOD.prepare(make_actor()) as policy:
        twice = analyze(policy, again, tmp_path / "twice", progress=False)
    torch.testing.assert_close(twice["cache", FC2], again["cache", FC2])


def test_tasks_are_the_frame_that_pandas_writes(data: TensorDict, results: TensorDict, tmp_path: Path) -> None:
    """As which it is read: by name the number of each task, which every row has."""
    pandas = pytest.importorskip("pandas")
    path = to_parquet(results, tmp_path / "set", data, task="reach the corner")
    made = pq.read_table(path / "meta" / "tasks.parquet")
    tasks = pandas.DataFrame({"task_index": [0]}, index=["reach the corner"])
    pandas.testing.assert_frame_equal(made.to_pandas(), tasks)
    numbers = {"pandas_type": "int64", "numpy_type": "int64"}
    texts = {"pandas_type": "unicode", "numpy_type": "object"}  # of every version of pandas
    named = zip(made.schema.names, (numbers, texts), strict=True)
    assert json.loads(made.schema.metadata[b"pandas"]) == {
        "index_columns": ["__index_level_0__"], "column_indexes": [],
        "columns": [{"name": name, "field_name": name, **kind} for name, kind in named],
    }  # fmt: skip
    assert load_parquet(path)["task_index"].unique().tolist() == [0]


def test_keys_of_the_buffer(data: TensorDict, results: TensorDict, tmp_path: Path) -> None:
    path = to_parquet(results, tmp_path / "set", data, ["action", ("next", "observation")])
    names = pq.read_schema(path / "data" / "chunk-000" / "file-000.parquet").names
    assert {"action", "next.observation", "attr.observation"} < set(names)
    assert "observation.state" not in names


@pytest.mark.parametrize(
    "keys",
    [
        (("cache", "a.b"), ("cache", "a", "b")), ("attr.observation", ("attr", "observation")),
        ("observation", "observation.state"),
    ],
    ids=str,
)  # fmt: skip
def test_two_keys_of_one_column_are_refused(keys: tuple[Any, Any], tmp_path: Path) -> None:
    """The second took the place of the first."""
    found = TensorDict({keys[0]: torch.zeros(5, 2), keys[1]: torch.ones(5, 3)}, [5])
    with pytest.raises(InputError, match=r"both have a column '.*': write them apart"):
        to_parquet(found, tmp_path / "found.parquet")
    assert not [*tmp_path.iterdir()]
    for key in keys:
        to_parquet(found.select(key), tmp_path / f"{key}.parquet")


def test_two_keys_of_one_column_of_a_frame_are_refused() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed: no data frames are made here")
    found = TensorDict({"cache": {"0": torch.zeros(5, 2), "0.1": torch.ones(5)}}, [5])  # a module, and one inside it
    with pytest.raises(InputError, match=r"both have a column 'cache\.0\.1'"):
        frame(found)
    assert len(frame(found, names={"cache.0": ["left", "right"]}).columns) == 3


def test_books_of_rows_that_have_their_own_numbers(data: TensorDict, results: TensorDict, tmp_path: Path) -> None:
    """A part of a data set that was read is a data set again, with episodes and tasks that its books have."""
    whole = to_parquet(results, tmp_path / "set", data, fps=10.0)
    kept = torch.arange(ROWS) % 40 >= 20  # of the rows as they lie
    part = TensorDict({"attr": {"x": torch.ones(ROWS, 1)}, "index": torch.arange(ROWS)}, [ROWS])[kept]
    again = to_parquet(part, tmp_path / "part", whole, fps=10.0)
    found, books = load_parquet(again), pq.read_table(again / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    lengths = books["length"].to_pylist()
    assert found["episode_index"].tolist() == [number for number, one in enumerate(lengths) for _ in range(one)]
    assert found["frame_index"].tolist() == [step for one in lengths for step in range(one)]
    assert found["buffer_index"].tolist() == kept.nonzero().flatten().tolist()
    assert torch.equal(found["timestamp"], load_parquet(whole)["timestamp"][kept])  # the times that they had


@pytest.mark.parametrize("rows", [slice(None), slice(0, 17), slice(3, None, 2)], ids=str)
@pytest.mark.parametrize("name", ["set", "found.parquet"])
def test_episodes_that_are_not_whole_are_not_so_when_they_are_read(name: str, rows: slice, tmp_path: Path) -> None:
    """A ring has written over the beginning of one, and rows were not analysed."""
    reward = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).double()
    done = (torch.arange(30) % 4 == 3)[:, None]
    buffer = ReplayBuffer(storage=LazyTensorStorage(22))
    for part in TensorDict({"next": {"reward": reward, "done": done}}, [30]).split(10):
        buffer.extend(part)
    chosen = torch.arange(22)[rows]
    found = TensorDict({"attr": {"x": torch.ones(len(chosen), 1)}, "index": chosen}, [len(chosen)])
    path = to_parquet(found, tmp_path / name, buffer)
    expected = [one.total for one in returns(buffer).episodes if one.whole and torch.isin(one.rows, chosen).all()]
    assert [one.total for one in returns(path).episodes if one.whole] == pytest.approx(expected)
    if name == "set":
        books = pq.read_table(path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        assert sum(map(all, zip(books["begun"].to_pylist(), books["ended"].to_pylist(), strict=True))) == len(expected)


def test_a_data_frame(data: TensorDict, results: TensorDict) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed: no data frames are made here")
    found = frame(results, data, ["action"], names={"attr.observation": [f"light {n}" for n in range(90)]})
    assert len(found) == ROWS
    entries = torch.from_numpy(found["buffer_index"].to_numpy().copy())
    attr = found["attr.observation.light 3"].to_numpy()
    np.testing.assert_array_equal(attr, results["attr", "observation"][entries, 3].numpy())
    np.testing.assert_array_equal(found["action"].to_numpy(), data["action"][entries].numpy())
    assert found.groupby("episode_index").size().sum() == ROWS
    with pytest.raises(InputError, match=r"2 names of 'attr\.observation', which has 90"):
        frame(results, names={"attr.observation": ["a", "b"]})
    with pytest.raises(InputError, match=r"is 'observation'; nearest: 'attr\.observation'"):
        frame(results, names={"observation": ["a", "b"]})
    with pytest.raises(ArgumentError, match=r"frame\(results=...\) takes"):  # the two turned round
        frame(ReplayBuffer(storage=LazyTensorStorage(4)), results)


def test_a_minari_dataset(
    data: TensorDict, results: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari", reason="minari is not installed: its datasets are not written here")
    pytest.importorskip("h5py", reason="h5py is not installed, in which Minari's files are")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a dataset for others ought to say of itself
        made = to_minari(results, data, "cue/explained-v0")
    assert made.total_steps == ROWS
    from tdhook_rl.replay import in_order

    _, again = next(iter(in_order(minari.load_dataset("cue/explained-v0"), 1000)))
    order = torch.cat([one.rows for one in returns(data).episodes])
    for key in ("observation", "action", ("next", "reward"), ("next", "terminated"), ("next", "observation")):
        assert torch.equal(again[key].reshape(-1), data[key][order].reshape(-1)), key
    for key in (("attr", "observation"), ("cache", FC2)):
        torch.testing.assert_close(again["info", ".".join(key)], results[key][order])
    with pytest.raises(ArtifactError, match="cue/explained-v0"):
        to_minari(results, data, "cue/explained-v0")


# ------------------------------------------------------------------ what cannot be written or read


def _with(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


READ: dict[str, tuple[Callable[[Path], Any], Any, type[Exception], str]] = {
    "no such file": (lambda path: None, None, ArtifactError, "cannot read"),
    "an empty folder": (lambda path: path.mkdir(), None, ArtifactError, "there is no Parquet file in"),
    "another file": (lambda path: path.write_text("hello"), None, ArtifactError, "cannot read"),
    "a cut file": (lambda path: _cut(path), None, ArtifactError, "cannot read"),
    "a missing column": (_with(x=[1.0]), [("attr", "observation")], MissingKeyError,
                         r"has no column of \('attr', 'observation'\)"),
    "a name that is near": (_with(**{"attr.observation": [1.0]}), [("attr", "observations")], MissingKeyError,
                            "nearest: 'attr.observation'"),
    "text": (_with(x=["a"]), None, ArtifactError, "'x' holds string, which is no number"),
    "rows without a value": (_with(x=[1.0, None]), None, ArtifactError, "1 rows without a value"),
    "ragged rows": (_with(x=[[1.0], [1.0, 2.0]]), None, ArtifactError, "'x' differ in length"),
}  # fmt: skip


def _cut(path: Path) -> None:
    _with(x=[1.0])(path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("kind", READ)
def test_what_cannot_be_read(kind: str, tmp_path: Path) -> None:
    make, keys, error, message = READ[kind]
    make(tmp_path / "found.parquet")
    with pytest.raises(error, match=message):
        load_parquet(tmp_path / "found.parquet", keys)


def test_a_file_of_others(tmp_path: Path) -> None:
    _with(**{"observation.state": [[1.0, 2.0]], "action": [3], "action.more": [4]})(tmp_path / "x.parquet")
    found = load_parquet(tmp_path / "x.parquet")
    assert found["observation", "state"].tolist() == [[1.0, 2.0]]
    assert found["action"].tolist() == [3]  # though the name of another begins with it
    # By the name that an observation has elsewhere, too.
    for key in ("observation", ("observation", "state")):
        assert load_parquet(tmp_path / "x.parquet", [key])["observation", "state"].tolist() == [[1.0, 2.0]]


def test_what_cannot_be_written(data: TensorDict, results: TensorDict, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="give buffer=, or name a file"):
        to_parquet(results, tmp_path / "set")
    (tmp_path / "there.parquet").write_text("mine")
    with pytest.raises(ArtifactError, match="is there already"):
        to_parquet(results, tmp_path / "there.parquet")
    with pytest.raises(ArtifactError, match="cannot write"):
        to_parquet(results, tmp_path / "there.parquet" / "more.parquet")
    with pytest.raises(ArtifactError, match=r"cannot write .*: Not a directory"):
        to_parquet(results, tmp_path / "there.parquet" / "set", data)
    with pytest.raises(MissingKeyError, match=r"keys= names 'actions'.*nearest"):
        to_parquet(results, tmp_path / "set", data, ["actions"])
    with pytest.raises(InputError, match="of a buffer, and none is given"):
        to_parquet(results, tmp_path / "x.parquet", keys=["action"])
    with pytest.raises(InputError, match="the results are of 120 entries"):
        to_parquet(results, tmp_path / "set", data[:50])
    with pytest.raises(InputError, match="complex64 has no place in a table"):
        to_parquet(TensorDict({"x": torch.zeros(2, dtype=torch.complex64)}, 2), tmp_path / "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]


def test_a_full_disk_leaves_nothing_behind(
    results: TensorDict, data: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    for path in (tmp_path / "x.parquet", tmp_path / "set"):
        with pytest.raises(ArtifactError, match="No space left on device"):
            to_parquet(results, path, data)
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    assert not any(tmp_path.iterdir())
