"""What mutation testing found that no test had noticed in analyses: manifests, results, selections, Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.replay import analyze, by_feature, load_results, probe_grid, smallest_margins, to_parquet
from tdhook_rl.replay.columns import plain
from tdhook_rl.replay.manifest import OF_SOME, WITHOUT_CHECKSUMS, Manifest, described, read_manifest, write_manifest
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


def test_options_that_are_nested_are_named_at_last() -> None:
    value: Any = 1
    for _ in range(8):
        value = [value]
    assert described(value) == [[[[[["list"]]]]]]
    assert described({"a": {2, 1}}) == {"a": [1, 2]}


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
