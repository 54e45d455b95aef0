"""What mutation testing found that no test had noticed in analyses: selections, tables, questions, defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.replay import (
    analyze,
    by_feature,
    episodes,
    frame,
    in_order,
    load_parquet,
    load_results,
    probe_grid,
    returns,
    rows_where,
    smallest_margins,
    to_parquet,
)
from tdhook_rl.replay.columns import plain
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


# ------------------------------------------------------------------ selections


@pytest.mark.parametrize("place", [100, 300])
def test_some_rows_of_whole_trajectories_are_mended(place: int, tmp_path: Path) -> None:
    """In the first block and in the second, in the midst of a trajectory; one is of both."""
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
        content[place * 16 : (place + 3) * 16] = bytes(48)
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
    plain_one = TensorDictModule(net, ["input"], ["output"])
    plainly = probe_grid(plain_one, rows, **options, batch_size=64, progress=lambda *one: told.append(one))
    assert found.json() == plainly.json()
    held = int(GroupSplit("episode")(rows)[1].sum())
    ends = {what: (done, size) for what, done, size in told}
    assert ends == {"reading labels": (200, 200), "fitting": (200 - held,) * 2, "scoring": (held, held)}
    assert [done for what, done, _ in told if what == "reading labels"] == [64, 128, 192, 200]


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


@pytest.mark.parametrize("shape", [(ROWS,), (4, 10)])
@pytest.mark.parametrize("end", ["done", "terminated", "truncated"])
def test_an_episode_ends_by_whatever_says_so(end: str, shape: tuple[int, ...]) -> None:
    rows = _episodes()
    ended = (torch.arange(ROWS) % 10 == 4)[:, None] | rows["next", "done"]
    rows["next"] = TensorDict({"reward": rows["next", "reward"], end: ended}, [ROWS])
    found = returns(rows.reshape(shape))
    assert [one.total for one in found.episodes] == [5.0] * 8
    assert all(one.ended for one in found.episodes)
    assert found.rows.tolist() == [5.0, 4.0, 3.0, 2.0, 1.0] * 8


def test_preferences_are_the_first_that_are_there() -> None:
    given = {"action_value": [0.0, 3.0], "logits": [0.0, 2.0], "probs": [0.25, 0.75]}
    for first, margin in (("action_value", 3.0), ("logits", 2.0), ("probs", 0.5)):
        rows = TensorDict({key: torch.tensor([value] * 2) for key, value in given.items()}, [2])
        assert smallest_margins(rows)["margin"].tolist() == [margin] * 2
        beside = smallest_margins(TensorDict({"x": torch.zeros(2)}, [2]), rows)
        assert beside["margin"].tolist() == [margin] * 2
        del given[first]
    with pytest.raises(InputError, match="a margin is between two actions"):
        smallest_margins(TensorDict({"logits": torch.zeros(2, 1)}, [2]))


def test_what_is_done_of_an_analysis_answers_questions(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    rows = _episodes()
    with Saliency(target=targets.logit(0)).prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        with pytest.warns(UserWarning, match="time_budget= are over"):
            analyze(hooked, rows, tmp_path, batch_size=15, time_budget=0.0)
    assert by_feature(tmp_path, rows)["0"]["attr.observation"].rows == 15
    assert frame(tmp_path, rows)["buffer_index"].tolist() == list(range(15))
    best = episodes(rows, tmp_path, k=4)
    assert [int(one.data["computed", "attr"].sum()) for one in best] == [10, 5, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rows": [-300, -1]}, [0, 299]),
        ({"rows": torch.tensor([200, 7], dtype=torch.uint8)}, [7, 200]),
        ({"rows": torch.tensor([299, 7], dtype=torch.int16)}, [7, 299]),
        ({"rows": slice(290, None, 4), "fraction": 1e-9}, None),
        ({"rows": range(3), "fraction": 1.0}, [0, 1, 2]),
    ],
)
def test_choices_at_the_edges(options: dict[str, Any], expected: list[int] | None, tmp_path: Path) -> None:
    """The first by its number from the end, numbers that a byte holds, a share that is less than one entry."""
    rows = TensorDict({"x": torch.randn(300, 2)}, [300])
    told: list[tuple[int, int]] = []
    with Saliency(target=targets.logit(0)).prepare(nn.Linear(2, 2), in_keys=["x"], out_keys=["logits"]) as hooked:
        found = analyze(hooked, rows, tmp_path, progress=lambda *one: told.append(one), **options)["index"].tolist()
    assert found == expected if expected is not None else len(found) == 1 and found[0] in (290, 294, 298)
    assert (told[0], told[-1]) == ((0, len(found)), (len(found), len(found)))


def test_an_analysis_of_one_entry_that_is_done_is_read_and_no_file_stays_open(tmp_path: Path) -> None:
    results = Results.create(tmp_path, TensorDict({"x": torch.zeros(1)}, [1]), 100, {})
    results.write(0, TensorDict({"x": torch.zeros(1)}, [1]))
    results.sync()
    assert len(load_results(tmp_path, partial=True)) == 1
    if (descriptors := Path("/proc/self/fd")).exists():
        before = len(list(descriptors.iterdir()))
        for entry in range(1, 100):
            results.write(entry, TensorDict({"x": torch.ones(1)}, [1]))
        assert len(list(descriptors.iterdir())) == before


def test_a_byte_of_a_table_that_changed_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = to_parquet(TensorDict({"x": torch.rand(2000, 3)}, [2000]), tmp_path / "x.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        load_parquet(path)


@pytest.mark.parametrize("shape", [(40,), (8, 5), (4, 2, 5)])
def test_rows_of_entries_of_any_shape(shape: tuple[int, ...]) -> None:
    """With their results beside them, whichever key of these comes first."""
    rows, value = _episodes().exclude("next").reshape(shape), torch.rand(ROWS, 2)
    index = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    results = TensorDict({"index": index, "attr": {"x": value.reshape(*shape, 2)}}, shape)
    found = rows_where(rows, lambda part: part["observation"][:, 0] > 30, results, batch_size=7)
    assert found["index"].tolist() == list(range(16, ROWS))
    assert torch.equal(found["attr", "x"], value[16:])
    with pytest.raises(InputError, match="give the buffer that was analysed"):
        rows_where(rows, lambda part: part["observation"][:, 0] > 0, results.set("index", index + 1))


# ------------------------------------------------------------------ what is meant where nothing is said

DEFAULTS: dict[Callable[..., Any], dict[str, Any]] = {
    analyze: {"seed": 0, "on_mismatch": "warn", "engine": "local", "workers": 2},
    by_feature: {"confidence": 0.95},
    episodes: {"order": "worst", "k": 5, "gamma": 1.0, "reward": ("next", "reward")},
    in_order: {"batch_size": 1024, "start": 0},
    load_results: {"verify": False, "partial": False},
    probe_grid: {"layout": "flat", "batch_size": 4096, "min_rows": 10, "confidence": 0.95, "seed": 0},
    returns: {"gamma": 1.0, "reward": ("next", "reward"), "batch_size": 16384},
    rows_where: {"most": 1000, "batch_size": 16384},
    smallest_margins: {"k": 10, "batch_size": 16384},
    to_parquet: {"fps": 1.0, "task": "", "chunk": 16384},
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda one: one.__name__)
def test_a_default_is_a_promise(function: Callable[..., Any]) -> None:
    """Results that are stored were computed with it, and the same call is to go on with them."""
    given = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    found = {name: value for name, value in given.items() if value not in (inspect.Parameter.empty, None)}
    assert {name: value for name, value in found.items() if value != () and value != "observation"} == DEFAULTS[
        function
    ]


@pytest.mark.parametrize("most", [1, 7, 8, 14, 40, 41])
def test_of_as_many_as_are_asked_for_the_first(most: int) -> None:
    """No more is read than it takes."""
    read: list[int] = []

    def wanted(part: TensorDict) -> torch.Tensor:
        read.append(len(part))
        return part["observation"][:, 0] >= 0

    found = rows_where(_episodes(), wanted, most=most, batch_size=7)
    assert found["index"].tolist() == list(range(min(most, ROWS)))
    assert sum(one > 1 for one in read) == -(-min(most, ROWS) // 7)  # beside some rows that are asked of alone
