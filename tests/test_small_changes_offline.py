"""What mutation testing found that no test had noticed in analyses: manifests, results, selections, Parquet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.replay import (
    analyze,
    by_feature,
    frame,
    load_parquet,
    load_results,
    probe_grid,
    smallest_margins,
    to_parquet,
)
from tdhook_rl.replay.columns import plain
from tdhook_rl.replay.manifest import (
    DTYPES,
    OF_SOME,
    WITHOUT_CHECKSUMS,
    Manifest,
    described,
    read_manifest,
    write_manifest,
)
from tdhook_rl.replay.results import Results
from tdhook_rl.rollout import GroupSplit

ROWS = 40


def _episodes(**more: Any) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.arange(ROWS * 2.0).reshape(ROWS, 2),
            ("next", "reward"): torch.ones(ROWS, 1),
            ("next", "done"): (torch.arange(ROWS) % 10 == 9)[:, None],
            **more,
        },
        [ROWS],
    )


# ------------------------------------------------------------------ the books of a data set


def test_the_books_say_what_others_read(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    found = TensorDict({"attr": {"observation": torch.rand(ROWS, 3)}}, [ROWS])
    place = to_parquet(found, tmp_path / "set", _episodes(), keys=["observation"], fps=2.5, task="walk")
    info = json.loads((place / "meta" / "info.json").read_text())
    assert info.pop("features").keys() >= {"attr.observation", "observation.state", "episode_index", "timestamp"}
    assert info == {
        "codebase_version": "v3.0", "robot_type": None, "fps": 2.5, "total_episodes": 4, "total_frames": ROWS,
        "total_tasks": 1, "chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "splits": {"train": "0:4"}, "video_path": None,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }  # fmt: skip
    episodes = pq.read_table(place / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pydict()
    assert episodes == {
        "episode_index": [0, 1, 2, 3], "tasks": [["walk"]] * 4, "length": [10] * 4, "data/chunk_index": [0] * 4,
        "data/file_index": [0] * 4, "dataset_from_index": [0, 10, 20, 30], "dataset_to_index": [10, 20, 30, 40],
        "meta/episodes/chunk_index": [0] * 4, "meta/episodes/file_index": [0] * 4, "ended": [True] * 4,
        "begun": episodes["begun"],
    }  # fmt: skip
    tasks = pq.read_table(place / "meta" / "tasks.parquet").to_pandas()
    assert (tasks.index.tolist(), tasks.columns.tolist()) == (["walk"], ["task_index"])


def test_statistics_of_a_column_without_numbers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found = TensorDict({"attr": {"observation": torch.full((ROWS, 3), float("nan"))}}, [ROWS])
    place = to_parquet(found, tmp_path / "set", _episodes())
    stats = json.loads((place / "meta" / "stats.json").read_text())
    assert stats["attr.observation"] == {"min": [0.0], "max": [0.0], "mean": [0.0], "std": [0.0], "count": [0]}
    assert stats["observation.state"]["mean"] == [39.0, 40.0]


def test_an_empty_folder_of_the_users_stays_where_nothing_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "mine").mkdir()
    found = TensorDict({"attr": {"observation": torch.zeros(ROWS, 3, dtype=torch.complex64)}}, [ROWS])
    for name in ("mine", "new"):
        with pytest.raises(ValueError, match="complex64 has no place in a table"):
            to_parquet(found, tmp_path / name, _episodes())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine"]


def test_columns_of_numbers_that_numpy_lacks() -> None:
    assert plain(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == "float32"
    assert plain(torch.ones(3, 2, dtype=torch.float16)).dtype == "float16"


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 4), (7, 2, 3)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_rows_of_trajectories_are_rows_of_a_table(shape: tuple[int, ...], chunk: int, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("pandas")
    value = torch.rand(*shape, 2)
    found = TensorDict({"attr": {"x": value}, "index": torch.arange(value[..., 0].numel()).reshape(shape)}, shape)
    again = load_parquet(to_parquet(found, tmp_path / "x.parquet", chunk=chunk))
    assert torch.equal(again["attr", "x"], value.reshape(-1, 2))
    assert again["index"].tolist() == list(range(len(again)))
    # As many entries at once as have so many rows, and one at least.
    entries = max(1, chunk // value[0, ..., 0].numel())
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == -(-7 // entries)
    table = frame(found)
    assert table["attr.x.1"].tolist() == value.reshape(-1, 2)[:, 1].tolist()
    assert load_parquet(tmp_path / "x.parquet", ["index"])["index"].tolist() == again["index"].tolist()


def test_columns_of_a_buffer_are_what_one_asks_for(tmp_path: Path) -> None:
    """Unless keys are named: all but next observations, books, and what results are computed."""
    pytest.importorskip("pandas")
    outcome = torch.zeros(ROWS, 1, dtype=torch.bool)
    rows = _episodes(**{"collector": TensorDict({"traj_ids": torch.arange(ROWS) // 10}, [ROWS]),
                        "computed": TensorDict({"cache": outcome[:, 0]}, [ROWS]), "one": torch.rand(ROWS, 1),
                        "attr": TensorDict({"old": torch.zeros(ROWS)}, [ROWS])})  # fmt: skip
    rows["next", "terminated"], rows["next", "truncated"] = outcome, outcome.clone()
    rows["next", "observation"] = rows["observation"]
    found = TensorDict({"attr": {"observation": torch.rand(ROWS, 2)}}, [ROWS])
    table = frame(found, rows)
    own = ["attr.observation.0", "attr.observation.1"]
    outcomes = ["next.done", "next.reward", "next.terminated", "next.truncated"]
    books = ["buffer_index", "episode_index", "frame_index"]
    assert sorted(table.columns) == sorted([
        *books, *own, *outcomes, "observation.state.0", "observation.state.1", "one"])  # fmt: skip
    assert table["frame_index"].tolist() == [*range(10)] * 4
    assert sorted(frame(found, rows, ["one"]).columns) == sorted([*books, *own, "one"])
    again = load_parquet(to_parquet(found, tmp_path / "set", rows), ["observation"])
    assert torch.equal(again["observation"], rows["observation"])


def test_some_trajectories_of_a_buffer_are_a_table_of_their_rows() -> None:
    pytest.importorskip("pandas")
    rows = _episodes().reshape(8, 5)
    kept = torch.tensor([1, 4, 5])
    index = kept[:, None].expand(3, 5)
    found = TensorDict({"attr": {"observation": rows["observation"][kept] + 0.5}, "index": index}, [3, 5])
    table = frame(found, rows)
    expected = torch.cat([torch.arange(5 * int(one), 5 * int(one) + 5) for one in kept])
    assert table["buffer_index"].tolist() == expected.tolist()
    assert table["attr.observation.0"].tolist() == (expected * 2.0 + 0.5).tolist()


# ------------------------------------------------------------------ manifests and results


def _manifest(**fields: Any) -> Manifest:
    keys = [{"key": ["attr", "x"], "shape": [4, 2], "dtype": "float32"}]
    return Manifest(**{"entries": 4, "done": 4, "batch_size": [4], "keys": keys, "facts": {}, "block": 256,
                       "checksums": [[0]], **fields})  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keys": [], "checksums": []}, "keys is empty"),
        ({"format": OF_SOME, "selection": {"of": 9}}, "selection is \"{'of': 9}\""),
        ({"format": OF_SOME, "selection": {"of": 3, "digest": "x"}}, "selection is 4 of '3' entries"),
        ({"format": OF_SOME, "selection": {"digest": "x"}}, "selection is 4 of 'None' entries"),
        ({"batch_size": []}, "batch_size is [], of 4 entries"),
        ({"batch_size": [3]}, "batch_size is [3], of 4 entries"),
        ({"keys": [{"key": ["", "x"], "shape": [4], "dtype": "float32"}]}, "is no key"),
        ({"keys": [{"key": [3], "shape": [4], "dtype": "float32"}]}, "is no key"),
        ({"keys": [{"key": ["x"], "shape": [4], "dtype": "float31"}]}, "the dtype of ['x'] is 'float31'"),
        ({"keys": [{"key": ["x"], "shape": [4, 1 << 60], "dtype": "int8"}]}, "more than any disk holds"),
        ({"block": 0}, "block is '0'"),
        ({"checksums": [[1 << 32]]}, "checksums is"),
        ({"checksums": [[-1]]}, "checksums is"),
        ({"checksums": [[0, 0]]}, "checksums is not one number for each block"),
    ],
)
def test_manifests_that_are_none(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest())
    assert read_manifest(tmp_path) == _manifest()
    write_manifest(tmp_path, _manifest(**fields))
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path)
    assert words in str(error.value)


def test_a_manifest_without_checksums_has_no_blocks(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest(format=WITHOUT_CHECKSUMS))
    assert not {"block", "checksums", "selection"} & json.loads((tmp_path / "analysis.json").read_text()).keys()
    assert not read_manifest(tmp_path).has_checksums


@dataclass
class _Options:
    rate: float
    inner: Any = None


class _Plain:
    def __init__(self) -> None:
        self.rate = 1.0


X = torch.arange(6).reshape(2, 3)
DESCRIBED: dict[str, tuple[Any, Any]] = {
    "nothing": (None, None),
    "a truth": (True, True),
    "a count": (7, 7),
    "a number": (0.1, "0.1"),
    "a number that JSON lacks": (float("inf"), "inf"),
    "a long text": ("x" * 300, "x" * 200),
    "a tensor": (X, {"shape": [2, 3], "dtype": "torch.int64", "content": described(X.clone())["content"]}),
    "a list as it lies": ([3, "b", None, "a"], [3, "b", None, "a"]),
    "a long list": (list(range(300)), list(range(200))),
    "a set in order": ({"b", "a"}, ["a", "b"]),
    "a mapping": ({1: {"a": 2}}, {"1": {"a": 2}}),
    "options": (_Options(0.5, [1]), {"method": "_Options", "rate": "0.5", "inner": [1]}),
    "a class of options": (_Options, f"{__name__}._Options"),
    "a function": (torch.nn.functional.relu, "torch.nn.functional.relu"),
    "an object of others": (_Plain(), f"<class '{__name__}._Plain'>"),
    "an object of ours": (
        GroupSplit("episode", held_out=0.5),
        {"method": "GroupSplit", "groupings": [["episode"]], "held_out": "0.5", "seed": 0},
    ),
    "what is nested": ([[[[[[[[1]]]]]]]], [[[[[["list"]]]]]]),
    "options that are nested": (
        _Options(1.0, _Options(1.0, {"a": [{"b": [[1]]}]})),
        {"method": "_Options", "rate": "1.0", "inner": {
            "method": "_Options", "rate": "1.0", "inner": {"a": [{"b": ["list"]}]}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DESCRIBED)
def test_how_the_manifest_describes(kind: str) -> None:
    """So that another option is another analysis, and the same one the same in every process."""
    value, expected = DESCRIBED[kind]
    assert described(value) == expected
    json.dumps(described(value))


def test_tensors_are_described_by_what_they_hold() -> None:
    assert len({described(one)["content"] for one in (X, X + 1, X.float() + 0.5)}) == 3
    assert len(described(X)["content"]) == 16


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
def test_results_of_every_dtype_are_found_again(name: str, tmp_path: Path) -> None:
    value = torch.arange(8).reshape(4, 2).to(getattr(torch, name))
    results = Results.create(tmp_path, TensorDict({"x": value[:1]}, [1]), 4, {})
    results.write(0, TensorDict({"x": value}, [4]))
    results.sync()
    found = Results.find(tmp_path)
    assert found is not None
    assert found.data["x"].dtype == value.dtype
    assert torch.equal(found.data["x"].view(torch.uint8), value.view(torch.uint8))
    assert found.damaged() == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"x": torch.zeros(2, 3)}, r"is (2, 3) torch.float32, where (2, 2) torch.float32 is kept"),
        ({"x": torch.zeros(2, 2).double()}, r"is (2, 2) torch.float64, where (2, 2) torch.float32 is kept"),
        ({"y": torch.zeros(2, 2)}, "of the entries from 2 on is absent, where"),
    ],
)
def test_results_keep_one_shape(found: dict[str, Any], words: str, tmp_path: Path) -> None:
    results = Results.create(tmp_path, TensorDict({"x": torch.zeros(2, 2)}, [2]), 4, {})
    results.write(0, TensorDict({"x": torch.ones(2, 2)}, [2]))
    with pytest.raises(ArtifactError) as error:
        results.write(2, TensorDict(found, [2]))
    assert words in str(error.value)


def test_files_that_are_cut_while_they_are_read(tmp_path: Path) -> None:
    results = Results.create(tmp_path, TensorDict({"x": torch.zeros(2, 2)}, [2]), 4, {})
    results.write(0, TensorDict({"x": torch.ones(4, 2)}, [4]))
    results.sync()
    assert results.damaged() == []
    (tmp_path / "x.memmap").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"cannot read .*x.memmap: it is cut"):
        results.damaged()


# ------------------------------------------------------------------ selections


def test_some_rows_of_whole_trajectories_are_mended(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    rows = TensorDict({"observation": torch.randn(1200, 4), "trajectory": torch.arange(1200) // 70}, [1200])
    rows["collector", "traj_ids"] = rows["trajectory"]
    chosen = torch.arange(35, 1100, 3)
    with Saliency(target=targets.logit(0), horizon="trajectory").prepare(
        net, in_keys=["observation"], out_keys=["logits"]
    ) as hooked:
        right = analyze(hooked, rows, tmp_path / "found", rows=chosen, batch_size=100).clone()
        path = tmp_path / "found" / "attr" / "observation.memmap"
        content = bytearray(path.read_bytes())
        content[300 * 16 : 303 * 16] = bytes(48)  # in the second block, in the midst of a trajectory
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="are computed again"):
            found = analyze(hooked, rows, tmp_path / "found", rows=chosen, batch_size=100)
    assert torch.equal(found["index"], chosen)
    torch.testing.assert_close(found["attr", "observation"], right["attr", "observation"])
    assert load_results(tmp_path / "found", verify=True) is not None


def test_margins_of_several_decisions_are_the_smallest_of_each_row() -> None:
    rows = TensorDict({"logits": torch.tensor([[[0.0, 3.0], [0.0, 0.2]], [[1.0, 0.5], [9.0, 0.0]],
                                               [[2.0, 8.0], [0.0, 7.0]]])}, [3])  # fmt: skip
    found = smallest_margins(rows, k=2, batch_size=1)
    assert found["index"].tolist() == [0, 1]
    torch.testing.assert_close(found["margin"], torch.tensor([0.2, 0.5]))


def test_a_hooked_policy_is_probed_as_the_plain_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(200, 4)
    rows = TensorDict({"input": x, "y": (x[:, 0] > 0).long(), "episode": torch.arange(200) // 2}, [200])
    options: dict[str, Any] = {"sites": "1", "concepts": {"y": "y"}, "split": GroupSplit("episode")}
    with Saliency().prepare(net) as hooked:
        found = probe_grid(hooked, rows, **options)
    told: list[tuple[str, int, int]] = []
    # Shuffled labels are dealt out alike, however many rows are read at once.
    plainly = probe_grid(hooked_root(net), rows, **options, batch_size=64, progress=lambda *one: told.append(one))
    assert found.json() == plainly.json()
    held = int(GroupSplit("episode")(rows)[1].sum())
    ends = {what: (done, size) for what, done, size in told}
    assert ends == {"reading labels": (200, 200), "fitting": (200 - held,) * 2, "scoring": (held, held)}
    assert [done for what, done, _ in told if what == "reading labels"] == [64, 128, 192, 200]


def hooked_root(net: nn.Module) -> nn.Module:
    """The policy that `prepare` makes of a plain module."""
    from tensordict.nn import TensorDictModule

    return TensorDictModule(net, in_keys=["input"], out_keys=["output"])


# ------------------------------------------------------------------ features over episodes


def test_rows_without_numbers_take_their_episodes_with_them() -> None:
    value = torch.rand(ROWS, 2)
    value[:10] = float("nan")  # all of the first episode
    value[25] = float("nan")
    found = by_feature(TensorDict({"attr": {"observation": value}}, [ROWS]), _episodes(), names=["a", "b"])
    one = found["b"]["attr.observation"]
    assert (one.groups, one.rows) == (3, 29)
    assert one.estimate == pytest.approx(float(value[value[:, 1].isfinite(), 1].mean()), abs=1e-6)


@pytest.mark.parametrize("shape", [(ROWS,), (8, 5)])
def test_rows_that_were_not_computed_count_for_nothing(shape: tuple[int, ...]) -> None:
    """Whatever number stands there, and in a mask of whatever shape."""
    value, computed = torch.rand(ROWS, 2) + 1, torch.rand(ROWS) < 0.5
    value[~computed] = 1e9
    rows = _episodes(attr=TensorDict({"observation": value}, [ROWS]), computed=TensorDict({"attr": computed}, [ROWS]))
    found = rows.select("attr", "computed").reshape(shape)
    means = by_feature(found, rows.reshape(shape))
    for feature in range(2):
        one = means[str(feature)]["attr.observation"]
        assert (one.rows, one.groups) == (int(computed.sum()), 4 if len(shape) == 1 else 8)
        assert one.estimate == pytest.approx(float(value[computed, feature].mean()), abs=1e-6)
    where = by_feature(found, rows.reshape(shape), where=lambda part: part["observation"][..., 0] >= 40)
    assert where["0"]["attr.observation"].rows == int(computed[20:].sum())


def test_results_that_are_no_block_of_memory_are_read_as_they_are() -> None:
    value = torch.rand(2, ROWS).T
    assert not value.is_contiguous()
    rows = _episodes()
    found, same = (
        by_feature(TensorDict({"attr": {"observation": one}}, [ROWS]), rows) for one in (value, value.contiguous())
    )
    assert found == same
    with pytest.raises(InputError, match="2 features: one each, different"):
        by_feature(TensorDict({"attr": {"observation": value}}, [ROWS]), rows, names=["a", "a"])


def test_what_needs_episodes_says_so() -> None:
    rows = _episodes().exclude(("next", "done"))
    with pytest.raises((InputError, MissingKeyError), match="by_feature"):
        by_feature(TensorDict({"attr": {"observation": torch.rand(ROWS, 2)}}, [ROWS]), rows)


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found = TensorDict({"attr": {"observation": torch.rand(ROWS, 2)}}, [ROWS])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "a.parquet").mkdir()
    for name in ("file", "folder", "a.parquet"):
        with pytest.raises(ArtifactError, match="is there already: name a new one"):
            to_parquet(found, tmp_path / name, _episodes())
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    place = to_parquet(found, tmp_path / "empty", _episodes(), fps=10.0)
    assert '"fps": 10,' in (place / "meta" / "info.json").read_text()
