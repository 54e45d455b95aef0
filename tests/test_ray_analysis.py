"""``analyze(engine="ray")``: the same bytes as on one machine, whatever happens to the actors."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.cli import main
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, WorkerError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, load_results, to_parquet, work
from tdhook_rl.rollout import EPISODE
from tests.matrix_rows import start_ray, stop_ray
from tests.walks import fitted, require_one_pass

pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'tdhook_rl[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.limit(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    start_ray()
    yield ray
    stop_ray()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("buffer")
    data = CueCorners(batch_size=[50], seed=1).rollout(20, make_actor(), break_when_any_done=False)
    buffer = ReplayBuffer(storage=LazyMemmapStorage(1000, scratch_dir=base / "scratch"))
    buffer.extend(data.reshape(-1).detach())
    buffer.dumps(base / "buffer")
    return base / "buffer"


@pytest.fixture(scope="module")
def policy() -> Iterator[Any]:
    torch.manual_seed(0)
    with Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor()) as hooked:
        yield hooked


def files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*.memmap")}


@pytest.mark.parametrize("options", [{}, {"fraction": 0.3}, {"rows": slice(100, 400)}], ids=["all", "a share", "some"])
def test_the_bytes_are_those_of_one_machine(ray: Any, folder: Path, policy: Any, tmp_path: Path, options: Any) -> None:
    analyze(policy, folder, tmp_path / "here", batch_size=64, **options)
    analyze(policy, folder, tmp_path / "there", batch_size=64, engine="ray", workers=2, **options)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert len(files(tmp_path / "here")) > 2
    load_results(tmp_path / "there", verify=True)


def test_parquet_is_read_by_each_actor(ray: Any, folder: Path, policy: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    nothing = TensorDict({"attr": {"other": torch.zeros(1000)}}, [1000])
    to_parquet(nothing, tmp_path / "set", folder, ["observation", "action", "logits"], chunk=200)
    analyze(policy, folder, tmp_path / "here", batch_size=64, on_mismatch="ignore")
    analyze(policy, tmp_path / "set", tmp_path / "there", batch_size=64, engine="ray", on_mismatch="ignore")
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_each_actor_computes_with_one_thread(ray: Any, folder: Path, tmp_path: Path) -> None:
    def threads(output: Any) -> Any:
        return torch.full_like(output, torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        with ActivationCaching(FC2, callback=threads).prepare(make_actor()) as hooked:
            found = analyze(hooked, folder, tmp_path / "there", engine="ray", workers=2, on_mismatch="ignore")
    finally:
        torch.set_num_threads(1)
    assert bool((found["cache", FC2] == 1).all())


AGENT = """
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from tdhook_rl import ActivationCaching

class Net(nn.Module):  # of a module that only the command knows
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(90, 4)

    def forward(self, observation):
        return self.fc(observation).tanh()

def hooked():
    torch.manual_seed(0)
    return ActivationCaching("module.fc").prepare(TensorDictModule(Net(), ["observation"], ["logits"]))
"""


def test_the_command_goes_on(
    ray: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent_of_a_command.py").write_text(AGENT)
    (tmp_path / "ray.json").write_text(json.dumps({"engine": "ray", "workers": 2}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["analyze", str(folder), "--policy", "agent_of_a_command:hooked", "--batch-size", "64"]
    command += ["--on-mismatch", "ignore"]
    assert main([*command, "--engine", "ray", "--workers", "2", "--out", "there", "--time-budget", "0"]) == 0
    assert "of 1000 entries are done" in capsys.readouterr().out
    assert main([*command, "--config", "ray.json", "--out", "there"]) == 0
    assert "the results of 1,000 entries" in capsys.readouterr().out
    assert (tmp_path / "there" / "report.html").exists()
    assert main([*command, "--out", "here"]) == 0
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert main([*command, "--engine", "ray", "--workers", "0", "--out", "none"]) == 1
    assert "workers= is a positive integer, got 0" in capsys.readouterr().err


def test_actors_that_die_change_nothing(ray: Any, folder: Path, policy: Any, tmp_path: Path) -> None:
    analyze(policy, folder, tmp_path / "here", batch_size=16)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and len(killed) < 3:
            for one in Path("/proc").glob("[0-9]*"):
                try:
                    words = (one / "cmdline").read_text()
                except OSError:
                    continue
                if "MapWorker" in words or "_Actor" in words:
                    os.kill(int(one.name), signal.SIGKILL)
                    killed.append(int(one.name))
                    break
            time.sleep(1.0)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        analyze(policy, folder, tmp_path / "there", batch_size=16, engine="ray", workers=2)
    finally:
        over.set()
        killer.join()
    assert killed
    assert files(tmp_path / "here") == files(tmp_path / "there")


@pytest.mark.parametrize("first", ["ray", "local"])
def test_what_one_began_the_other_ends(ray: Any, folder: Path, policy: Any, tmp_path: Path, first: Any) -> None:
    analyze(policy, folder, tmp_path / "here", batch_size=64)
    second: Any = "local" if first == "ray" else "ray"

    def stop(done: int, size: int) -> None:
        if done >= 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(policy, folder, tmp_path / "there", batch_size=64, engine=first, progress=stop)
    begun: list[int] = []
    analyze(
        policy, folder, tmp_path / "there", batch_size=64, engine=second, progress=lambda done, _: begun.append(done)
    )
    assert begun[0] >= 300
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_an_error_in_an_actor_is_that_error(
    ray: Any, folder: Path, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="workers="):
        analyze(policy, folder, tmp_path / "a", engine="ray", workers=0)
    lock = threading.Lock()

    def rows() -> Iterator[TensorDict]:
        with lock:
            yield TensorDict({"observation": torch.zeros(4, 90)}, [4])

    with pytest.raises(InputError, match="does not pickle"):
        analyze(policy, rows, tmp_path / "d", engine="ray", workers=1)

    def gone(output: Any) -> Any:
        raise InputError("the rows went away")

    def divided(output: Any) -> Any:
        return output * (1 / 0)

    # What is not where actors run.
    TensorDict({"observation": torch.zeros(4, 90)}, [4]).memmap(tmp_path / "rows")

    def away(*arguments: Any) -> Any:
        raise ModuleNotFoundError("No module named 'my_agent'")

    with monkeypatch.context() as patch, ActivationCaching(FC2).prepare(make_actor()) as hooked:
        patch.setattr(work, "_computing", away)
        with pytest.raises(WorkerError, match=r"'my_agent'.*runtime_env"):
            analyze(hooked, tmp_path / "rows", tmp_path / "e", engine="ray", workers=1, on_mismatch="ignore")
    bad = ActivationCaching(FC2, callback=divided).prepare(make_actor(), return_context=False)
    with pytest.raises(WorkerError, match="ended with "):
        analyze(bad, folder, tmp_path / "c", engine="ray", workers=1)
    other = ActivationCaching(FC2, callback=gone).prepare(make_actor(), return_context=False)
    with pytest.raises(InputError, match="the rows went away"):
        analyze(other, folder, tmp_path / "b", engine="ray", workers=1)


def test_suites_that_remote_tasks_fitted_add_up_to_one_pass(ray: Any) -> None:
    policy = make_actor()
    data = CueCorners(batch_size=[16], seed=2).rollout(80, policy, break_when_any_done=False).detach()
    ended = data["next", "done"][..., 0].long()
    data[EPISODE] = torch.arange(16)[:, None] * 80 + ended.cumsum(1) - ended
    weights, task = policy.state_dict(), ray.remote(fitted)
    first, second = ray.get([task.remote(weights, data[:8]), task.remote(weights, data[8:])])
    require_one_pass(first, second, fitted(weights, data))
