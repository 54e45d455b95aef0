"""Shared set-up: one thread (the machine may have two cores), quiet TorchRL, a fixed seed, a limit of time."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import pytest
import torch
import torchrl
from torch import Tensor
from torchrl.envs.utils import set_exploration_type

from tests.left_processes import left_behind

if TYPE_CHECKING:
    from tdhook_rl.calls.chains import Record

# What is imported and collected stays until the end: looking for garbage in it, while it grows, is a third of the time
# that collecting takes.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """From here on there is garbage, and what is there already is not looked through for it each time."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


os.environ.setdefault("WANDB_SILENT", "true")
os.environ["HF_HUB_OFFLINE"] = "1"
torchrl.logger.setLevel("ERROR")
torch.set_num_threads(1)

# A seed for devices that this build of torch does not know is queued with the stack of who set it: a millisecond each.
KNOWN = {torch.cuda: torch.backends.cuda.is_built(), **{one: one.is_available() for one in (torch.xpu, torch.mtia)}}
for device, known in KNOWN.items():
    if not known:
        device.manual_seed_all = lambda seed: None

# Workers are forked from a process that has imported what each would take seconds for. What is sent to them is pickled
# as by TorchRL's own way, "spawn", in which scripts, the demo and tests of "spawned" workers start theirs.
multiprocessing.set_start_method("forkserver", force=True)
multiprocessing.set_forkserver_preload(["torchrl.collectors", "torchrl.modules", "tdhook_rl.envs", "tdhook_rl.report"])


@pytest.fixture(autouse=True)
def _start() -> None:
    """One seed, one thread, and actions as each policy has it by default, whatever the last test has left.

    Collectors leave more threads when they end, and a forked child waits for the others; one that is interrupted may
    leave actions drawn.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    set_exploration_type(None).__enter__()


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """A process that outlives its test is ended and named here, before a later test is said to have left it."""
    known = multiprocessing.active_children()
    yield
    left = left_behind(known)
    for process in left:
        process.kill()
    assert not left, f"the test left {left} behind"


@pytest.fixture(autouse=True)
def _interrupts() -> None:
    """Ctrl-C is heard, also where the tests run in the background of a shell, or a library has set a handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``@pytest.mark.limit(seconds)``: a test that waits too long fails."""
    marker = request.node.get_closest_marker("limit")
    if marker is None:
        yield
        return
    seconds = marker.args[0]

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 60, exit=True)  # where no Python code runs that could raise
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def spawned() -> Iterator[None]:
    """Workers are started by TorchRL's own way, and write where the test looks."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The runs of chains whose gradient was asked of their records."""
    from tdhook_rl.calls.chains import Record

    asked: list[Record] = []
    pull = Record.pull

    def counted(self: Record, gradient: Tensor) -> Tensor:
        asked.append(self)
        return pull(self, gradient)

    monkeypatch.setattr(Record, "pull", counted)
    return asked
