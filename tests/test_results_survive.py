"""Results of an analysis after power loss, kills and full disks; one analysis at a time in a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.errors import ArtifactError, TdhookError
from tdhook_rl.files import durable
from tdhook_rl.replay import analyze, load_results, results
from tdhook_rl.replay.manifest import block_of
from tests.kept_analysis import METHOD, ROWS, is_right, network, run


class Stop(Exception):
    pass


def stopping(after: int) -> Callable[[int, int], None]:
    def stop(done: int, size: int) -> None:
        if done >= after:
            raise Stop

    return stop


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> TensorDict:
    return run(tmp_path_factory.mktemp("whole") / "results").clone()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """An analysis that was interrupted after 1800 rows."""
    with pytest.raises(Stop):
        run(tmp_path / "results", progress=stopping(1800))
    return tmp_path / "results"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.memmap"))


# ------------------------------------------------------------------ what never reached the disk


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("span", [(0, 0.01), (0.4, 0.41), (0.5, 0.8), (0.999, 1), (0, 1)])
def test_pages_of_zeros_are_found_and_computed_again(
    number: int, span: tuple[float, float], half: Path, right: TensorDict
) -> None:
    path = files(half)[number]
    start, stop = (int(share * 1800 * path.stat().st_size // ROWS) for share in span)
    with path.open("r+b") as file:
        file.seek(start)
        blank = bytes(stop - start) if file.read(stop - start) != bytes(stop - start) else b"\xff" * (stop - start)
        file.seek(start)
        file.write(blank)
    with pytest.warns(UserWarning, match="entries .* are not what was written .*they are computed again"):
        found = run(half)
    assert is_right(found, right)
    assert is_right(load_results(half, verify=True), right)


def test_blocks_of_several_files_and_the_last_that_is_not_whole(half: Path, right: TensorDict) -> None:
    size = block_of(ROWS)
    assert 1800 % size  # the last block that is done is not whole
    for path, row in zip(files(half), (0, 700, 1799, 1500), strict=True):
        each = path.stat().st_size // ROWS
        with path.open("r+b") as file:
            file.seek(row * each)
            old = file.read(each)
            file.seek(row * each)
            file.write(bytes(255 - one for one in old))
    with pytest.warns(UserWarning, match=r"the entries 0 to 255, 512 to 767, 1280 to 1535, 1792 to 1799 of 1800"):
        assert is_right(run(half), right)


def test_a_finished_analysis_is_held_against_its_checksums(tmp_path: Path, right: TensorDict) -> None:
    run(tmp_path)
    path = tmp_path / "cache" / "1.memmap"
    content = bytearray(path.read_bytes())
    content[40_000:44_096] = bytes(4096)
    path.write_bytes(content)
    assert not is_right(load_results(tmp_path), right)  # only what is cheap is looked at
    with pytest.raises(ArtifactError, match="the entries 1536 to 1791, 1792 to 2047 of the results"):
        load_results(tmp_path, verify=True)
    with pytest.warns(UserWarning, match="are computed again"):
        assert is_right(run(tmp_path), right)
    assert is_right(load_results(tmp_path, verify=True), right)


def test_trajectories_that_are_explained_whole_are_computed_again_whole(tmp_path: Path) -> None:
    method = Saliency(target=targets.logit(0), horizon="trajectory")
    buffer = ReplayBuffer(storage=LazyTensorStorage(1000))
    number = torch.arange(1000) // 70
    buffer.extend(TensorDict({"observation": torch.randn(1000, 4), "trajectory": number}, [1000]))
    with method.prepare(network(), in_keys=["observation"], out_keys=["logits"]) as hooked:
        found = analyze(hooked, buffer, tmp_path, batch_size=200)
        expected = found.clone()
        (path,) = files(tmp_path / "attr")
        with path.open("r+b") as file:
            file.seek(300 * 16)
            file.write(bytes(4096))
        with pytest.warns(UserWarning, match="the entries 256 to 511, 512 to 767"):
            again = analyze(hooked, buffer, tmp_path, batch_size=100)
    assert is_right(again, expected)


def test_other_weights_are_told_from_lost_pages(half: Path) -> None:
    path = half / "cache" / "1.memmap"
    with path.open("r+b") as file:
        file.write(bytes(4096))
    with pytest.raises(ArtifactError, match="is not what this policy computes now"):
        run(half, network(1))


# ------------------------------------------------------------------ one policy


def nudged(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        net[0].weight[0, 0] *= 1 + 1e-6
    return net


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "weights that are near": (lambda: nudged(network()), METHOD),
    "a control": (network, Compose(METHOD, SteeringVectors({"0": torch.full((6,), 1e-7)}, alpha=1e-7))),
    "an option": (network, Compose(ActivationCaching("1"), Saliency(target=targets.logit(0), inputs=["observation"]))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_results_are_of_one_policy(name: str, half: Path) -> None:
    net, method = OTHERS[name]
    with pytest.raises(ArtifactError, match="was computed with other"):
        run(half, net(), method)


@pytest.mark.parametrize("root", ["attr", "zz"])
def test_every_result_is_compared(root: str, tmp_path: Path) -> None:
    """Whether its key comes before that of the masks or after it; the last layer is part of no activation before it."""
    method = Compose(ActivationCaching("1"), Saliency(target=targets.logit(0), attribution_key=root))
    with pytest.raises(Stop):
        run(tmp_path, method=method, progress=stopping(600))
    other = network()
    with torch.no_grad():
        other[2].weight += 1
    with pytest.raises(ArtifactError, match=rf"\('{root}', 'observation'\) in .* is not what this policy computes now"):
        run(tmp_path, other, method)


def test_facts_say_what_computed_them(half: Path) -> None:
    facts = json.loads((half / "analysis.json").read_text())["facts"]
    assert facts["policy"] == "TensorDictModule"
    assert [one["method"] for one in facts["methods"]] == ["ActivationCaching", "Saliency"]
    assert set(facts["versions"]) == {"tdhook_rl", "torch", "torchrl", "tensordict"}
    assert len(facts["weights"]) == 32


# ------------------------------------------------------------------ on the disk before the manifest says so


def test_the_page_follows_what_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each manifest that is put in place, everything that it says is done was brought to the disk before."""
    monkeypatch.setattr(results, "SHARE", 1e9)  # after each chunk
    synced: dict[str, bytes] = {}
    folders: set[str] = set()
    at_disk: list[tuple[int, bool]] = []
    fsync, replace = os.fsync, Path.replace

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file():
            synced[str(path)] = path.read_bytes()
        else:
            folders.add(str(path))
        fsync(descriptor)

    def put(self: Path, target: Path) -> Path:
        manifest = json.loads(self.read_text())
        done = manifest["done"]
        for entry in manifest["keys"] if done else ():
            path = target.parent.joinpath(*entry["key"][:-1], f"{entry['key'][-1]}.memmap")
            upto = path.stat().st_size // ROWS * done
            at_disk.append((done, synced.get(str(path), b"")[:upto] == path.read_bytes()[:upto]))
            at_disk.append((done, {str(path.parent), str(target.parent), str(target.parent.parent)} <= folders))
        at_disk.append((done, synced[str(self)] == self.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", put)
    run(tmp_path / "results")
    assert {done for done, _ in at_disk} == {0, *range(300, ROWS + 1, 300)}
    assert all(there for _, there in at_disk)


def test_what_a_kill_takes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow disks are waited for at most every ten seconds, and then everything is brought there."""
    clock = [0.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[0])
    write, seen = results.Results.write, []

    def slow(self: results.Results, first: int, found: Any, read: Any) -> None:
        write(self, first, found, read)
        clock[0] += 3.0
        self._cost = 1000.0
        seen.append(self.done - self.manifest.done)

    monkeypatch.setattr(results.Results, "write", slow)
    run(tmp_path / "results")
    assert max(seen) == 4 * 300  # the chunks of twelve seconds
    assert load_results(tmp_path / "results", verify=True) is not None


@pytest.mark.slow
def test_a_process_that_is_killed_loses_little(tmp_path: Path, right: TensorDict) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_killed, args=(tmp_path / "results",))
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    assert is_right(run(tmp_path / "results"), right)  # nobody holds the folder any more


def _killed(folder: Path) -> None:
    def kill(done: int, size: int) -> None:
        if done == 2100:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, progress=kill)


# ------------------------------------------------------------------ one at a time


def test_another_thread_is_refused(tmp_path: Path, right: TensorDict) -> None:
    ends: list[Any] = []

    def other(done: int, size: int) -> None:
        if done == 900:
            thread = threading.Thread(target=lambda: ends.append(_end(tmp_path / "results")))
            thread.start()
            thread.join(60)

    found = run(tmp_path / "results", progress=other)
    assert len(ends) == 1
    assert "another analysis is under way in" in str(ends[0])
    assert is_right(found, right)
    assert is_right(run(tmp_path / "results"), right)  # free again


def _end(folder: Path) -> Exception | None:
    try:
        run(folder)
    except TdhookError as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_another_process_is_refused_and_a_child_does_not_hold_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    codes: list[int] = []
    left: list[int] = []

    def fork(done: int, size: int) -> None:
        if done == 300:
            child = os.fork()
            if child == 0:
                os._exit(7 if "under way" in str(_end(folder)) else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            child = os.fork()  # a worker that outlives the analysis
            if child == 0:
                signal.pause()
                os._exit(0)
            left.append(child)
        if done == 600:
            raise Stop

    try:
        with pytest.raises(Stop):
            run(folder, progress=fork)
        assert codes == [7]
        run(folder)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_folder_is_left_as_it_was_where_nothing_came_of_it(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "a" / "b", progress=stopping(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space left on device"), "No space left on device"), (RuntimeError("no map"), "no map")],
)
def test_files_that_cannot_be_made_say_why(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(TensorDict, "memmap_like", fails)
    with pytest.raises(ArtifactError) as raised:
        run(tmp_path / "results")
    assert str(raised.value) == f"cannot write {tmp_path / 'results'}: {words}"


# ------------------------------------------------------------------ full disks


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(durable.os, "statvfs", lambda _: Full)
    chunks: list[int] = []
    with pytest.raises(ArtifactError, match="the results take 126 kB, and there is room for 41 kB"):
        run(tmp_path / "results", progress=lambda done, _: chunks.append(done))
    assert chunks == [0]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 16 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_that_shows_when_files_are_made(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*results"):
        run(tmp_path / "results")
    assert list(tmp_path.iterdir()) == []


def test_files_have_all_their_room(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "results", progress=stopping(300))
    for path in files(tmp_path / "results"):
        status = path.stat()
        assert status.st_blocks * 512 >= status.st_size


def test_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: TensorDict) -> None:
    pwrite = os.pwrite

    def fails(descriptor: int, content: bytes, where: int) -> int:
        if where > 10_000:
            raise OSError(5, "Input/output error")
        return pwrite(descriptor, content[:100], where)  # less than it was asked to, as it may

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(ArtifactError, match="Input/output error"):
            run(tmp_path / "results")
    assert is_right(run(tmp_path / "results"), right)
