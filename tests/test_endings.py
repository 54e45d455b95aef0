"""Workers that end, are stopped, or go on after the block; programs that are stopped at any moment; nothing is kept."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InactiveError, WorkerError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import Guarded

# Workers that were forked were seen, now and then, to end later than spawned ones, on a busy machine.
pytestmark = [pytest.mark.limit(150), pytest.mark.usefixtures("spawned")]


def env() -> CueCorners:
    torch.set_num_threads(1)
    return CueCorners(batch_size=[8])


class Leaving(CueCorners):
    """An environment that ends its process without a word."""

    def _step(self, data: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > 40:
            os._exit(3)
        return super()._step(data)


def leaving() -> CueCorners:
    return Leaving(batch_size=[8])


def collector_of(policy: Any, second: Callable[[], Any] = env, kind: Any = MultiSyncCollector) -> Any:
    return kind([env, second], policy, frames_per_batch=320, total_frames=-1, auto_register_policy_transforms=False)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# ------------------------------------------------------------------ workers

ENDS: dict[str, tuple[Any, Callable[[], Any], int | None, str]] = {
    "SIGTERM": (MultiSyncCollector, env, signal.SIGTERM, "worker 1 .* was killed by SIGTERM"),
    "SIGTERM of one of many that do not wait": (MultiAsyncCollector, env, signal.SIGTERM, "worker 1 .* SIGTERM"),
    "exit": (MultiSyncCollector, leaving, None, "worker 1 .* ended with exit code 3"),
}


@pytest.mark.parametrize(
    "how", [one if one == "SIGTERM" else pytest.param(one, marks=pytest.mark.slow) for one in ENDS]
)
def test_a_worker_is_named_whatever_way_it_ended(how: str) -> None:
    kind, second, number, message = ENDS[how]
    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    inner = collector_of(policy, second, kind)
    pids = [worker.pid for worker in inner.procs]
    with pytest.raises(WorkerError, match=message), Guarded(inner, timeout=60) as guarded:  # noqa: PT012
        for batch, _ in enumerate(guarded):
            if batch == 0 and number is not None:
                os.kill(pids[1], number)
            assert batch < 200
    assert all(map(gone, pids))


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_an_error_after_the_time_limit() -> None:
    policy = ActivationCaching(FC2).prepare(make_actor(), return_context=False)
    inner = collector_of(policy)
    pids = [worker.pid for worker in inner.procs]
    words = r"within 2 s: worker 0 .* was stopped \(SIGSTOP\)"
    with pytest.raises(WorkerError, match=words), Guarded(inner, timeout=60) as guarded:  # noqa: PT012
        for _ in guarded:
            guarded.timeout = 2.0
            os.kill(pids[0], signal.SIGSTOP)
    assert all(map(gone, pids))


@pytest.mark.slow
def test_workers_do_not_go_on_hooked_after_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    with ActivationCaching(FC2).prepare(make_actor()) as policy:
        inner = collector_of(policy)
        guarded = Guarded(inner, timeout=60)
        iterator = iter(guarded)
        assert ("cache", FC2) in next(iterator).keys(True)
    start = time.monotonic()
    with pytest.raises((WorkerError, InactiveError, RuntimeError)):  # noqa: PT012
        for _ in range(3):  # what a worker has begun in the block it may bring
            next(iterator)
    assert time.monotonic() - start < 50
    guarded.shutdown()
    assert "called after its context had ended" in capfd.readouterr().err


def test_copies_in_other_processes_look_at_the_switch() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    data = TensorDict({"input": torch.randn(3, 4)}, [3])
    with ActivationCaching("0").prepare(net) as policy:
        here = pickle.loads(pickle.dumps(policy))
        child = os.fork()
        if child == 0:
            # The parent leaves the block meanwhile.
            signal.signal(signal.SIGALRM, lambda *_: os._exit(2))
            signal.alarm(20)
            policy(data.clone())
            try:
                while True:
                    policy(data.clone())
                    time.sleep(0.01)
            except InactiveError:
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(0.2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    here(data.clone())  # a copy in this process is one of its own, as before


# ------------------------------------------------------------------ what is freed


class Named(TensorDictModule):
    """A class that can be imported."""


def _local_module(held: torch.Tensor) -> nn.Module:
    class Local(TensorDictModule):
        data = held

    return Local(nn.Linear(4, 2), in_keys=["x"], out_keys=["y"])


def _local_layer(held: torch.Tensor) -> nn.Module:
    class Layer(nn.Module):
        data = held

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    return TensorDictModule(Layer(), in_keys=["x"], out_keys=["y"])


def _local_draw(held: torch.Tensor) -> nn.Module:
    class Choice(Categorical):
        data = held

    class Actor(ProbabilisticActor):
        data = held

    return Actor(TensorDictModule(nn.Linear(4, 2), ["x"], ["logits"]), in_keys=["logits"], distribution_class=Choice)


def _local_sequence(held: torch.Tensor) -> nn.Module:
    class Steps(TensorDictSequential):
        data = held

    class Part(TensorDictModule):
        data = held

    return Steps(Part(nn.Linear(4, 3), ["x"], ["h"]), Part(nn.Linear(3, 2), ["h"], ["y"]))


def _with_a_closure(held: torch.Tensor) -> nn.Module:
    return TensorDictModule(nn.Linear(4, 2), ["x"], ["y"]).apply(lambda one: one.__dict__.update(kept=lambda: held))


LOCALS = [_local_module, _local_layer, _local_draw, _local_sequence, _with_a_closure]


@pytest.mark.filterwarnings("ignore:deterministic_sample wasn't found")
@pytest.mark.parametrize("make", LOCALS)
@pytest.mark.parametrize("how", ["caching", "saliency", "annotate", "run", "annealed"])
def test_what_policies_hold_is_freed(make: Callable[[torch.Tensor], nn.Module], how: str) -> None:
    def once() -> weakref.ref[torch.Tensor]:
        held = torch.zeros(1000)
        policy = make(held)
        method = ActivationCaching(".*") if how in ("caching", "run") else Saliency()
        data = TensorDict({"x": torch.randn(2, 4)}, [2])
        with method.prepare(policy) as hooked:
            if how == "annealed":
                policy.temperature = 2.0
            found = hooked(data)
            if how == "annotate":
                hooked.annotate(found)
            if how == "run":
                with hooked.run(data):
                    pass
        return weakref.ref(held)

    references = [once() for _ in range(4)]
    gc.collect()
    assert sum(reference() is not None for reference in references) == 0


def test_copies_pickle_and_no_policy_shares_its_compiled_code_with_another() -> None:
    policies = [Named(nn.Linear(4, 2), ["x"], ["y"]) for _ in range(2)]
    hooked = [ActivationCaching("module").prepare(one, return_context=False) for one in policies]
    hooked += [pickle.loads(pickle.dumps(hooked[0])), copy.deepcopy(hooked[0])]
    assert len({id(type(one).forward.__code__) for one in hooked}) == 4
    assert all(isinstance(one, Named) and type(one).__name__ == "HookedNamed" for one in hooked)


# ------------------------------------------------------------------ stopped at any moment


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Programs in a group of their own, as a terminal has them."""
    programs: list[subprocess.Popen[str]] = []

    def start(*arguments: str, cwd: Any = None) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, "-m", "tdhook_rl.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, cwd=cwd,
        )  # fmt: skip
        programs.append(program)
        return program

    yield start
    for program in programs:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


@pytest.mark.parametrize("after", [1.0, *(pytest.param(one, marks=pytest.mark.slow) for one in (2.5, 5.0))])
@pytest.mark.parametrize("command", ["demo", "experiment", "check"])
def test_ctrl_c_ends_in_one_line(command: str, after: float, started: Any, tmp_path: Any) -> None:
    arguments = {
        "demo": ["demo", "--workers", "1", "--logger", "csv", "--out", str(tmp_path / "out")],
        "experiment": ["experiment", "probing", "--train", "--seed", "7", "--out", str(tmp_path / "out")],
        "check": ["check", "--workers", "1"],
    }[command]
    program = started(*arguments, cwd=Path.cwd())
    time.sleep(after)
    if program.poll() is not None:
        pytest.skip("it has ended already")
    os.killpg(program.pid, signal.SIGINT)
    output = program.communicate(timeout=60)[0]
    lines = [line for line in output.splitlines() if line.strip() and "━" not in line]
    assert "Traceback" not in output, output
    assert program.returncode == 130, output
    assert [line for line in lines if "stopped" in line], output
