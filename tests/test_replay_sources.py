"""What an analysis reads: buffers in every state, folders that TorchRL wrote, offline datasets, and iterables."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import TensorDictMaxValueWriter
from torchrl.envs.transforms import CatFrames, DoubleToFloat, RewardScaling
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, in_order, load_results

ENVS, STEPS = 6, 20
ROWS = ENVS * STEPS
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
KEYS = [("cache", FC2), ("attr", "observation")]


@pytest.fixture(scope="module")
def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    return make_actor()


@pytest.fixture(scope="module")
def data(actor: ProbabilisticActor) -> TensorDict:
    found = CueCorners(batch_size=[ENVS], seed=0).rollout(STEPS, actor, break_when_any_done=False).detach()
    found["collector", "traj_ids"] = torch.arange(ENVS)[:, None].expand(ENVS, STEPS).clone()
    return found


def results(actor: ProbabilisticActor, source: Any, folder: Path, **options: Any) -> TensorDict:
    with METHOD.prepare(actor) as policy:
        return analyze(policy, source, folder, batch_size=32, **options)


def expected(actor: ProbabilisticActor, rows: TensorDict) -> TensorDict:
    with METHOD.prepare(actor) as policy:
        return policy.annotate(rows)


def same(found: TensorDict, rows: TensorDict) -> None:
    assert found.batch_size == rows.batch_size
    for key in KEYS:
        torch.testing.assert_close(found[key], rows[key])


# ------------------------------------------------------------------ what holds the same rows


def dumped(storage: Any, rows: TensorDict, folder: Path, parts: int = 1, **options: Any) -> Path:
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=4, **options)
    for part in rows.chunk(parts):
        buffer.extend(part)
    buffer.dumps(folder)
    return folder


def mapped(rows: TensorDict, folder: Path) -> Path:
    rows.memmap(folder)
    return folder


#: Of all rows: what is analysed.
FLAT: dict[str, Callable[[TensorDict, Path], Any]] = {
    "a full buffer that was saved": lambda rows, at: dumped(LazyTensorStorage(ROWS), rows, at),
    "one that was partly filled": lambda rows, at: dumped(LazyTensorStorage(2 * ROWS), rows, at, parts=3),
    "a memory-mapped one": lambda rows, at: dumped(LazyMemmapStorage(500, scratch_dir=at / "of"), rows, at / "saved"),
    "one that was saved where it lies": lambda rows, at: dumped(
        LazyMemmapStorage(500, scratch_dir=at / "storage"), rows, at
    ),
    "its storage alone": lambda rows, at: dumped(LazyTensorStorage(500), rows, at) / "storage",
    "a memory-mapped TensorDict": lambda rows, at: mapped(rows, at),
    "its path as text": lambda rows, at: str(mapped(rows, at)),
    "a TensorDict": lambda rows, at: rows,
    "a storage": lambda rows, at: TensorDictReplayBuffer(storage=_filled(rows)).storage,
    "a list of trajectories": lambda rows, at: list(rows.reshape(ENVS, STEPS).unbind(0)),
    "a list of batches": lambda rows, at: list(rows.reshape(ENVS, STEPS).split(4)),
    "pieces of several lengths": lambda rows, at: [rows[:1], rows[1:1], rows[1:50], rows[50:]],
    "a function": lambda rows, at: lambda: (one for one in rows.split(17)),
    "something that can be gone through again": lambda rows, at: dict(enumerate(rows.split(50))).values(),
}  # fmt: skip


def _filled(rows: TensorDict) -> LazyTensorStorage:
    storage = LazyTensorStorage(500)
    ReplayBuffer(storage=storage).extend(rows)
    return storage


@pytest.fixture(autouse=True)
def unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))


@pytest.mark.parametrize("source", FLAT)
def test_every_source_goes_on_where_it_stopped(
    source: str, actor: ProbabilisticActor, data: TensorDict, tmp_path: Path
) -> None:
    rows = data.reshape(-1)
    made = FLAT[source](rows, tmp_path / "source")

    def stop(done: int, size: int) -> None:
        assert size == ROWS
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results(actor, made, tmp_path / "results", progress=stop)
    found = results(actor, made, tmp_path / "results")
    same(found, expected(actor, rows))
    assert (load_results(tmp_path / "results", verify=True) == found).all()


@pytest.mark.parametrize("kind", ["two dimensions", "two dimensions, partly filled", "trajectories", "mapped"])
def test_folders_of_trajectories(kind: str, actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    match kind:
        case "two dimensions":
            source = dumped(LazyTensorStorage(ROWS, ndim=2), data, tmp_path / "source")
        case "two dimensions, partly filled":
            source = dumped(LazyTensorStorage(4 * ROWS, ndim=2), data, tmp_path / "source")
        case "trajectories":
            source = dumped(LazyTensorStorage(100), data, tmp_path / "source")
        case _:
            source = mapped(data, tmp_path / "source")
    same(results(actor, source, tmp_path / "results"), expected(actor, data))


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
def test_a_ring_that_went_round_keeps_its_trajectories(
    saved: bool, rounds: int, data: TensorDict, tmp_path: Path
) -> None:
    """Frames reach back into a trajectory that goes round the end of the storage, as the writer wrote it."""
    rows, size = data.reshape(-1), 50
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=4)
    for part in torch.cat([rows[at : at + 35] for at in range(0, 35 * rounds, 35)]).split(35):
        buffer.extend(part)
    frames = CatFrames(N=3, dim=-1, in_keys=["observation"], out_keys=["frames"], padding="same")
    if saved:
        buffer.dumps(tmp_path)
        from tdhook_rl.reading.folders import open_folder

        again = open_folder(tmp_path)
        assert again.write_count == buffer.write_count
        buffer = again
    buffer.append_transform(frames)
    found = torch.cat([batch for _, batch in in_order(buffer, 7)])
    written = rows[: 35 * rounds]
    kept = written[max(0, len(written) - size) :]
    cursor = len(written) % size
    order = torch.arange(len(kept)).roll(-cursor) if len(written) > size else torch.arange(len(kept))
    number = kept["collector", "traj_ids"]
    for place, entry in enumerate(order.tolist()):
        begin = place
        while begin and not kept["next", "done"][begin - 1] and number[begin - 1] == number[place]:
            begin -= 1
        row = [kept["observation"][max(begin, place - back)] for back in (2, 1, 0)]
        assert torch.equal(found["frames"][entry], torch.cat(row))


def test_pieces_are_trajectories_where_nothing_says_more(data: TensorDict) -> None:
    from tdhook_rl.reading.reader import Reader

    bare = [one.select("observation") for one in data.unbind(0)]
    reader = Reader([bare[0], bare[1][:5], torch.stack(bare[2:4])], whole=True)
    assert list(reader.chunks(1)) == [(0, 20), (20, 25), (25, 45), (45, 65)]
    # Where rows say more, a trajectory may go on in the next piece.
    told = data.reshape(-1).select("observation", ("collector", "traj_ids"))
    assert list(Reader([told[:13], told[13:]], whole=True).chunks(1))[:2] == [(0, 20), (20, 40)]


# ------------------------------------------------------------------ what cannot be analysed


def _drop(*parts: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        path = folder.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return drop


def _cut(folder: Path) -> None:
    path = folder / "storage" / "next" / "observation.memmap"
    path.write_bytes(path.read_bytes()[:-8])


def _write(text: str, *parts: str) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(*parts).write_text(text) and None


def _facts(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a cut file": (_cut, ArtifactError, r"has \d+ bytes, and 'observation' of shape \(200, 90\) has 72000"),
    "a missing file": (_drop("storage", "observation.memmap"), ArtifactError, "has 0 bytes, and 'observation'"),
    "a missing folder": (_drop("storage", "next"), ArtifactError, "lacks the folder of 'next'"),
    "no description": (_drop("storage", "meta.json"), ArtifactError, "is not what memmap"),
    "no JSON": (_write("{", "storage", "meta.json"), ArtifactError, "is not what memmap"),
    "a list": (_write("[]", "storage", "meta.json"), ArtifactError, "is not what memmap"),
    "another shape": (_facts("storage/meta.json", observation={"dtype": "torch.float32", "shape": [1 << 41]}),
                      ArtifactError, "says that 'observation' is"),
    "another type": (_facts("storage/meta.json", observation={"dtype": "torch.nn", "shape": [2]}),
                     ArtifactError, "says that 'observation' is"),
    "ragged": (_facts("storage/meta.json", observation={"dtype": "torch.float32", "shape": [2], "is_nested": True}),
               ArtifactError, "ragged"),
    "no facts of the storage": (_drop("storage", "storage_metadata.json"), ArtifactError, "is not what dumps"),
    "more rows than there are": (_facts("storage/storage_metadata.json", len=300), ArtifactError, "counts 300 rows"),
    "no number of rows": (_facts("storage/storage_metadata.json", len="x"), ArtifactError, "has 'x' rows"),
    "no rows": (_facts("storage/storage_metadata.json", len=0), InputError, "is empty"),
    "no TensorDicts": (_facts("storage/storage_metadata.json", is_pytree=True), InputError, "holds no TensorDicts"),
    "a writer that wrote less than nothing": (_facts("writer/metadata.json", write_count=-1), ArtifactError, "-1 rows"),
    "a compressed storage": (_write("", "storage", "data_indices.json"), ArtifactError, "compressed"),
    "HDF5": (_write("", "storage", "checkpoint.h5"), ArtifactError, "HDF5"),
    "another folder": (_drop("storage"), ArtifactError, "holds neither a buffer"),
    "results": (_write("{}", "analysis.json"), ArtifactError, "holds the results of an analysis"),
    "nothing": (_drop(), ArtifactError, "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    change, error, message = DAMAGES[damage]
    source = dumped(LazyTensorStorage(200), data.reshape(-1), tmp_path / "source")
    change(source)
    before = {path: path.stat().st_size for path in source.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        results(actor, source, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert before == {path: path.stat().st_size for path in source.rglob("*") if path.is_file()}


def test_what_is_pickled_is_refused(actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    rows = data.reshape(-1).copy()
    rows.set_non_tensor("note", b"bytes")
    rows.memmap(tmp_path / "source")
    with pytest.raises(ArtifactError, match="entries that are pickled"):
        results(actor, tmp_path / "source", tmp_path / "results")


def test_transforms_that_a_folder_does_not_hold(actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS), batch_size=4)
    buffer.append_transform(RewardScaling(0.0, 2.0, in_keys=[("next", "reward")]))
    buffer.extend(data.reshape(-1))
    buffer.dumps(tmp_path / "source")
    with pytest.warns(UserWarning, match="had transforms, which a folder does not hold"):
        found = results(actor, tmp_path / "source", tmp_path / "results")
    same(found, expected(actor, data.reshape(-1)))


def _other_rows_each_time() -> Iterator[TensorDict]:
    yield TensorDict({"observation": torch.randn(5, 90)}, batch_size=5)


def _fewer_rows_each_time() -> Callable[[], Iterator[TensorDict]]:
    calls: list[int] = []

    def make() -> Iterator[TensorDict]:
        calls.append(1)
        return iter([TensorDict({"observation": torch.zeros(5, 90)}, batch_size=5)] * (3 - len(calls)))

    return make


def _alike(**other: torch.Tensor) -> list[TensorDict]:
    made = TensorDict({"observation": torch.zeros(5, 90)}, batch_size=5)
    return [made, TensorDict({"observation": torch.zeros(5, 90)} | other, batch_size=5)]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, r"gives no rows \(0 TensorDicts\)"),
    "empty TensorDicts": (lambda: [TensorDict({"observation": torch.zeros(0, 90)}, batch_size=0)], "gives no rows"),
    "an empty TensorDict": (lambda: TensorDict({}, batch_size=0), "has no rows"),
    "a TensorDict of one step": (lambda: TensorDict({}), "has no rows"),
    "an iterator": (lambda: _other_rows_each_time(), "can be gone through once only"),
    "a list of steps": (lambda: [TensorDict({"a": torch.zeros(1)})], "without a batch dimension"),
    "a list of tensors": (lambda: [torch.zeros(3)], "number 0 is tensor"),
    "a list of paths": (lambda: ["here"], "number 0 is 'here'"),
    "other keys": (lambda: _alike(more=torch.zeros(5)), "number 1 differs in .*more"),
    "other shapes": (lambda: _alike(observation=torch.zeros(5, 91)), "number 1 differs in .*observation"),
    "other types": (lambda: _alike(observation=torch.zeros(5, 90).double()), "number 1 differs in .*observation"),
    "rows that are drawn anew": (lambda: _other_rows_each_time, "gave other rows the second time"),
    "rows that end": (_fewer_rows_each_time, "gave other rows the second time"),
    "a collector": (lambda: Collector(CueCorners(batch_size=[2]), make_actor(), frames_per_batch=4, total_frames=8,
                                      auto_register_policy_transforms=False), "a collector gives other rows"),
    "a storage that TorchRL counts wrongly": (
        lambda: ReplayBuffer(storage=TensorStorage(TensorDict({"a": torch.zeros(6, 4)}, batch_size=[6, 4]), ndim=2)),
        "counts 6 rows, so it gives only some of them"),
    "a number": (lambda: 3, r"takes ReplayBuffer \| .*, got 3"),
    "nothing": (lambda: None, "got None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, actor: ProbabilisticActor, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        results(actor, make(), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_writer_that_keeps_no_order_is_kept_from_trajectories(data: TensorDict, tmp_path: Path) -> None:
    rows = data.reshape(-1).copy().set("rank", torch.rand(ROWS))
    folder = dumped(LazyTensorStorage(ROWS), rows, tmp_path, writer=TensorDictMaxValueWriter(rank_key="rank"))
    assert sum(len(batch) for _, batch in in_order(folder, 50)) == ROWS
    from tdhook_rl.reading.reader import Reader

    with pytest.raises(InputError, match="MaxValueWriter of the buffer does not keep them"):
        Reader(folder, whole=True)


# ------------------------------------------------------------------ offline datasets


def test_a_minari_dataset(
    actor: ProbabilisticActor, data: TensorDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari", reason="minari is not installed: its datasets are not read here")
    pytest.importorskip("h5py", reason="h5py is not installed, in which Minari's files are")
    import gymnasium
    import numpy as np
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from torchrl.data.datasets import MinariExperienceReplay

    monkeypatch.undo()  # HDF5 may
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = []
    for number, one in enumerate(data.unbind(0)):
        length = STEPS - number  # of several lengths
        last = one["next", "observation"][length - 1 : length]
        seen = torch.cat([one["observation"][:length], last]).double().numpy()
        ends = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                id=number, observations=seen, actions=one["action"][:length].numpy(),
                rewards=one["next", "reward"][:length, 0].double().numpy(), terminations=ends,
                truncations=np.zeros(length, bool),
            )
        )  # fmt: skip
    warnings.simplefilter("ignore")  # what a dataset for others ought to say of itself
    minari.create_dataset_from_buffers(
        "cue/corners-v0", buffer=episodes,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (90,), np.float64),
        action_space=gymnasium.spaces.Discrete(4),
    )  # fmt: skip
    rows = torch.cat([one[: STEPS - number] for number, one in enumerate(data.unbind(0))])
    whole = expected(actor, rows)
    stored = minari.load_dataset("cue/corners-v0")
    twin = copy.deepcopy(actor).double()
    with METHOD.prepare(twin) as policy:
        found = analyze(policy, stored, tmp_path / "results", on_mismatch="ignore", batch_size=32)
    for key in KEYS:
        torch.testing.assert_close(found[key].float(), whole[key])
    episodes = next(batch for _, batch in in_order(stored, 1000))
    for key in (("next", "reward"), ("collector", "traj_ids"), "action", "observation"):
        assert torch.equal(episodes[key].to(rows[key].dtype), rows[key])
    assert torch.equal(episodes["next", "observation"][:19], episodes["observation"][1:20])
    assert episodes["next", "done"].nonzero()[:, 0].tolist() == [19, 38, 56, 73, 89, 104]
    # As TorchRL loads it: right, or known to be empty.
    options = {"batch_size": 8, "root": tmp_path / "torchrl", "load_from_local_minari": True}
    dataset = MinariExperienceReplay("cue/corners-v0", **options)
    dataset.append_transform(DoubleToFloat(in_keys=["observation"]))
    if not dataset.storage[:]["observation"].any():  # of TorchRL 0.14.1
        with pytest.raises(InputError, match=r"every entry of MinariExperienceReplay.* is zero"):
            results(actor, dataset, tmp_path / "zeros", on_mismatch="ignore")
        for key in ("observation", "action", "episode"):
            of = episodes["collector", "traj_ids"] if key == "episode" else episodes[key]
            dataset.storage[:][key].copy_(of)
    same(results(actor, dataset, tmp_path / "dataset", on_mismatch="ignore"), whole)
    with METHOD.prepare(twin) as policy:  # the folder that TorchRL has made of it
        again = analyze(policy, tmp_path / "torchrl" / "cue" / "corners-v0", tmp_path / "again", on_mismatch="ignore")
    torch.testing.assert_close(again["cache", FC2].float(), whole["cache", FC2])
