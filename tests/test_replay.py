"""Offline analysis of replay buffers: every storage, interruptions, and results that do not belong together."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers import ReplayBufferEnsemble
from torchrl.data.replay_buffers.storages import CompressedListStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import ObservationNorm
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, Scheduled, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.method import Method
from tdhook_rl.replay import analyze, in_order, load_results, work

ROWS, STEPS = 10, 20
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
KEYS = [("cache", FC2), ("attr", "observation"), ("computed", "cache"), ("computed", "attr")]


@pytest.fixture(scope="module")
def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    return make_actor()


@pytest.fixture(scope="module")
def data(actor: ProbabilisticActor) -> TensorDict:
    return CueCorners(batch_size=[ROWS], seed=0).rollout(STEPS, actor, break_when_any_done=False).detach()


@pytest.fixture
def buffer(data: TensorDict) -> ReplayBuffer:
    return filled(LazyTensorStorage(ROWS * STEPS), data.reshape(-1))


def filled(
    storage: object, data: TensorDict, kind: type[ReplayBuffer] = ReplayBuffer, **options: object
) -> ReplayBuffer:
    made = kind(storage=storage, **options)
    made.extend(data)
    return made


def run(
    actor: ProbabilisticActor, buffer: ReplayBuffer, folder: Path, method: Method = METHOD, **options
) -> TensorDict:
    with method.prepare(actor) as policy:
        return analyze(policy, buffer, folder, batch_size=64, **options)


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[int, int], None]:
    def stop(done: int, size: int) -> None:
        if done >= after:
            raise Stop

    return stop


# ------------------------------------------------------------------ storages

STORAGES: dict[str, Callable[[Path], tuple[object, type[ReplayBuffer]]]] = {
    "tensor": lambda _: (LazyTensorStorage(1000), ReplayBuffer),
    "full": lambda _: (LazyTensorStorage(ROWS * STEPS), TensorDictReplayBuffer),
    "memmap": lambda folder: (LazyMemmapStorage(1000, scratch_dir=folder), TensorDictReplayBuffer),
    "list": lambda _: (ListStorage(1000), ReplayBuffer),
    "lists of a TensorDict buffer": lambda _: (ListStorage(1000), TensorDictReplayBuffer),
    "stack": lambda _: (LazyStackStorage(1000), TensorDictReplayBuffer),
    "an offline dataset": lambda _: (None, TensorDictReplayBuffer),
    "compressed": lambda _: (CompressedListStorage(1000), TensorDictReplayBuffer),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage(storage: str, actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    made, kind = STORAGES[storage](tmp_path / "buffer")
    rows = data.reshape(-1)
    if made is None:  # as Minari's and D4RL's are: written by nobody
        buffer = kind(storage=TensorStorage(rows), writer=ImmutableDatasetWriter())
    else:
        buffer = filled(made, rows, kind)
    found = run(actor, buffer, tmp_path / "results")
    with METHOD.prepare(actor) as policy:
        expected = policy.annotate(data.reshape(-1))
    assert found.batch_size == (ROWS * STEPS,)
    for key in KEYS:
        torch.testing.assert_close(found[key], expected[key])
    assert (load_results(tmp_path / "results") == found).all()


@pytest.mark.parametrize("ndim", [1, 2], ids=["trajectories", "two dimensions"])
def test_entries_that_are_trajectories(ndim: int, actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    buffer = filled(LazyTensorStorage(1000 if ndim == 2 else ROWS, ndim=ndim), data, TensorDictReplayBuffer)
    found = run(actor, buffer, tmp_path / "results")
    with METHOD.prepare(actor) as policy:
        expected = policy.annotate(buffer[torch.arange(ROWS)])
    assert found.batch_size == (ROWS, STEPS)
    for key in KEYS:
        torch.testing.assert_close(found[key], expected[key])
    assert [len(batch) for _, batch in in_order(buffer, 3 * STEPS)] == [3, 3, 3, 1]
    assert [first for first, _ in in_order(buffer, 1, start=7)] == [7, 8, 9]


def test_rows_are_those_that_samples_would_have(actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    buffer = filled(LazyTensorStorage(ROWS * STEPS), data.reshape(-1))
    before = buffer.storage[:].clone()
    buffer.append_transform(ObservationNorm(loc=0.5, scale=2.0, in_keys=["observation"]))
    with Saliency(target=targets.entropy()).prepare(actor) as policy:
        found = analyze(policy, buffer, tmp_path, on_mismatch="ignore")
        expected = policy.annotate(buffer[torch.arange(ROWS * STEPS)], on_mismatch="ignore")
    torch.testing.assert_close(found["attr", "observation"], expected["attr", "observation"])
    assert (buffer.storage[:] == before).all()


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("after", [64, 192])
def test_it_goes_on_where_it_was_interrupted(
    after: int, actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path
) -> None:
    whole = run(actor, buffer, tmp_path / "whole")
    with pytest.raises(Stop):
        run(actor, buffer, tmp_path / "parts", progress=stopping(after))
    with pytest.raises(ArtifactError, match=f"has reached {after} of 200 entries"):
        load_results(tmp_path / "parts")
    seen: list[tuple[int, int]] = []
    found = run(actor, buffer, tmp_path / "parts", progress=lambda *done: seen.append(done))
    assert seen[0] == (after, 200)
    assert seen[-1] == (200, 200)
    for key in KEYS:
        assert torch.equal(found[key], whole[key])
    assert (load_results(tmp_path / "parts") == whole).all()


def test_a_process_that_is_killed(actor: ProbabilisticActor, data: TensorDict, tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_killed, args=(actor, data, tmp_path / "parts"))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    manifest = json.loads((tmp_path / "parts" / "analysis.json").read_text())
    assert manifest["done"] <= 128  # what was on the disk
    buffer = filled(LazyTensorStorage(ROWS * STEPS), data.reshape(-1))
    found = run(actor, buffer, tmp_path / "parts")
    whole = run(actor, buffer, tmp_path / "whole")
    for key in KEYS:
        torch.testing.assert_close(found[key], whole[key])


def _killed(actor: ProbabilisticActor, data: TensorDict, folder: Path) -> None:
    torch.set_num_threads(1)

    def kill(done: int, size: int) -> None:
        if done == 128:
            os.kill(os.getpid(), signal.SIGKILL)

    run(actor, filled(LazyTensorStorage(ROWS * STEPS), data.reshape(-1)), folder, progress=kill)


def test_what_is_finished_is_not_computed_again(
    actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(actor, buffer, tmp_path)
    with METHOD.prepare(actor) as policy:
        rows: list[int] = []
        monkeypatch.setattr(
            work, "annotate_part", lambda policy, batch, *_, **__: rows.append(len(batch)) or policy.annotate(batch)
        )
        again = analyze(policy, buffer, tmp_path)
    assert rows == [32]  # those that are checked
    assert (again == found).all()


def test_a_schedule_chooses_other_rows_each_time(
    actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path
) -> None:
    method = Scheduled(Saliency(target=targets.chosen_logit()), fraction=0.5)
    with pytest.raises(Stop):
        run(actor, buffer, tmp_path, method, progress=stopping(64))
    torch.manual_seed(1)
    found = run(actor, buffer, tmp_path, method)
    share = found["computed", "attr"].float().mean()
    assert 0.4 < share < 0.6
    assert found["attr", "observation"][found["computed", "attr"]].isfinite().all()


# ------------------------------------------------------------------ results that do not belong together


@pytest.fixture
def started(actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path) -> Path:
    with pytest.raises(Stop):
        run(actor, buffer, tmp_path / "results", progress=stopping(128))
    return tmp_path / "results"


def test_other_weights(buffer: ReplayBuffer, started: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(ArtifactError, match="is not what this policy computes now"):
        run(make_actor(), buffer, started, on_mismatch="ignore")


def test_another_target(actor: ProbabilisticActor, buffer: ReplayBuffer, started: Path) -> None:
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.logit(0)))
    with pytest.raises(ArtifactError, match=r"\('attr', 'observation'\) in .* is not what"):
        run(actor, buffer, started, method)


def test_other_methods(actor: ProbabilisticActor, buffer: ReplayBuffer, started: Path) -> None:
    with pytest.raises(ArtifactError, match="this one computes nothing else"):
        run(actor, buffer, started, ActivationCaching(FC2))


def test_other_data(actor: ProbabilisticActor, data: TensorDict, started: Path) -> None:
    longer = filled(LazyTensorStorage(1000), torch.cat([data.reshape(-1)] * 2))
    with pytest.raises(ArtifactError, match="of a buffer of 200 entries, and this one has 400"):
        run(actor, longer, started)
    turned = filled(LazyTensorStorage(1000), data.reshape(-1).flip(0))
    with pytest.raises(ArtifactError, match="is not what this policy computes now"):
        run(actor, turned, started)


def _truncate(folder: Path) -> None:
    path = folder / "attr" / "observation.memmap"
    path.write_bytes(path.read_bytes()[:-4])


def _rewrite(**changes: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        manifest = json.loads((folder / "analysis.json").read_text())
        (folder / "analysis.json").write_text(json.dumps(manifest | changes))

    return rewrite


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "has 71996 bytes, expected 72000"),
    "missing": (lambda folder: (folder / "attr" / "observation.memmap").unlink(), "No such file"),
    "no JSON": (lambda folder: (folder / "analysis.json").write_text("{"), "is not the manifest of an analysis"),
    "a manifest of something else": (lambda folder: (folder / "analysis.json").write_text("{}"), "is not the manifest"),
    "another format": (_rewrite(format="x"), "its format is 'x'"),
    "another manifest": (_rewrite(keys=3), "keys is '3'"),
    "a path outside": (
        _rewrite(keys=[{"key": ["..", "..", "x"], "shape": [200], "dtype": "float32"}], checksums=[[0]]),
        "does not describe the files beside it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, actor: ProbabilisticActor, buffer: ReplayBuffer, started: Path) -> None:
    change, message = DAMAGES[damage]
    run(actor, buffer, started)
    change(started)
    for call in (lambda: run(actor, buffer, started), lambda: load_results(started)):
        with pytest.raises(ArtifactError, match=message):
            call()


def test_a_folder_in_which_nothing_was_written_yet(
    actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TensorDict, "memmap_like", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(actor, buffer, tmp_path)
    with pytest.raises(ArtifactError, match="has reached 0 of 200"):
        load_results(tmp_path)
    assert (run(actor, buffer, tmp_path) == load_results(tmp_path)).all()


def test_nothing_is_unpickled(
    actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(actor, buffer, tmp_path)
    (tmp_path / "other.pickle").write_bytes(b"not to be read")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))
    assert (load_results(tmp_path) == found).all()


# ------------------------------------------------------------------ bad input


def test_a_buffer_that_is_written_to_meanwhile(
    actor: ProbabilisticActor, buffer: ReplayBuffer, data: TensorDict, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="was written to while it was analysed \\(at entry 0 of 200\\)"):
        run(actor, buffer, tmp_path, progress=lambda *_: buffer.extend(data.reshape(-1)[:5]))


def test_folders_and_buffers_that_cannot_be_analysed(
    actor: ProbabilisticActor, buffer: ReplayBuffer, data: TensorDict, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty and holds no analysis\.json"):
        run(actor, buffer, tmp_path)
    with pytest.raises(ArtifactError, match="holds no analysis"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="cannot write"):
        run(actor, buffer, tmp_path / "notes.txt" / "folder")
    with pytest.raises(InputError, match="the replay buffer is empty"):
        run(actor, ReplayBuffer(storage=LazyTensorStorage(10)), tmp_path / "new")
    with pytest.raises(InputError, match="holds a Tensor where a TensorDict"):
        run(actor, filled(LazyTensorStorage(10), torch.zeros(10, 3)), tmp_path / "new")
    with pytest.raises(InputError, match="no storage order"):
        run(actor, ReplayBufferEnsemble(buffer, buffer, batch_size=4), tmp_path / "new")
    with pytest.raises(InputError, match="positive integer"):
        list(in_order(buffer, 0))
    with pytest.raises(InputError, match="computes nothing offline"):
        run(actor, buffer, tmp_path / "new", Compose(SteeringVectors({FC2: torch.zeros(64)}), ControlRecord()))
    assert not (tmp_path / "new").exists()
