"""The worker processes of a collector: which there are, how one ended, and calls that do not wait for a dead one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tdhook_rl.errors import WorkerError
from tdhook_rl.internals.torchrl_names import (
    async_pool,
    backend_of,
    collector_of,
    env_workers,
    has_env_workers,
    server_process,
)

#: Seconds between two looks at the workers while a call is under way.
POLL = 0.05


@dataclass(frozen=True)
class Worker:
    """A process that works for a collector."""

    name: str
    pid: int
    process: Any

    def ended(self) -> str | None:
        """How it ended, in words; ``None`` while it lives."""
        try:
            return None if self.process.is_alive() else _describe(self.process.exitcode)
        except ValueError:  # TorchRL closes the process objects of workers that it has ended
            return "was ended"

    def failed(self, ending: bool) -> bool:
        """Whether it ended by itself: not by returning, and not because its collector ended it.

        Args:
            ending: whether its collector ends its workers now, which it does by SIGTERM.
        """
        try:
            code = self.process.exitcode
        except ValueError:
            return False
        return code not in (None, 0) and not (ending and code in (-signal.SIGTERM, -signal.SIGKILL))

    def stopped(self) -> bool:
        """Whether it was stopped (SIGSTOP, Ctrl-Z) and waits to be continued; where there is no ``/proc``, no."""
        return _stat(self.pid)[:1] in (["T"], ["t"])

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"


def workers_of(collector: Any) -> list[Worker]:
    """The processes that a collector has started in this process: collectors, environments, a policy server.

    Example:
        >>> from torchrl.collectors import Collector
        >>> from tdhook_rl.envs import CueCorners
        >>> workers_of(Collector(CueCorners(), frames_per_batch=8, total_frames=8))
        []
    """
    collector = inner_collector(collector)
    found = [("worker", process) for process in getattr(collector, "procs", ())]
    found += [("environment worker", process) for process in env_workers(collector)]
    pool = async_pool(collector)
    found += [("environment worker", process) for process in getattr(pool, "threads", ())]
    env = collector.__dict__.get("env")  # the attribute of an AsyncBatchedCollector would start it
    while env is not None and not has_env_workers(env):
        env = getattr(env, "base_env", None)
    found += [("environment worker", process) for process in env_workers(env)]
    server = server_process(collector)
    found += [("inference server", server)] if server is not None else []
    counts: dict[str, int] = {}
    workers = []
    for kind, process in found:
        number = counts[kind] = counts.get(kind, -1) + 1
        # Threads share this list in some collectors; what has no exit code is no process.
        if hasattr(process, "exitcode"):
            with contextlib.suppress(ValueError):
                name = kind if kind == "inference server" else f"{kind} {number}"
                workers.append(Worker(name, process.pid, process))
    return workers


def is_ending(collector: Any) -> bool:
    """Whether a collector has begun to shut down, so that it ends its workers itself."""
    collector = inner_collector(collector)
    env = collector.__dict__.get("env")
    return any(getattr(one, name, False) is True for one in (collector, env) for name in ("closed", "is_closed"))


def inner_collector(collector: Any) -> Any:
    """The collector inside an ``Evaluator``, where it has been made already; any other collector itself."""
    backend = backend_of(collector)
    if backend is None:
        return collector
    made = collector_of(backend)
    return backend if made is None else made


class Caller:
    """Makes calls on a thread of its own, so that a call which never returns can be left behind.

    ``workers`` lists the workers at the time of asking; ``ending`` says whether the collector ends them itself.
    """

    #: Seconds in which a collector may notice by itself that a worker has returned.
    GRACE = 3.0

    def __init__(
        self, name: str, workers: Callable[[], Sequence[Worker]], ending: Callable[[], bool] = lambda: False
    ) -> None:
        self._name = name
        self._workers = workers
        self._ending = ending
        self._known: dict[int, Worker] = {}  # TorchRL forgets workers that it has ended
        self._calls: SimpleQueue[tuple[Callable[[], Any], list[Any], threading.Event]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, what: str, function: Callable[[], Any], timeout: float) -> Any:
        """The result of a call; ``what`` it is to bring is for messages.

        Raises:
            WorkerError: if a worker has died or dies meanwhile, or the time (in seconds) is over.
        """
        self.check()
        outcome: list[Any] = []
        done = threading.Event()
        if self._thread is None:
            # A daemon, and no executor: those are joined when the program ends.
            self._thread = threading.Thread(target=self._run, name=f"guard of {self._name}", daemon=True)
            self._thread.start()
        self._calls.put((function, outcome, done))
        start = time.monotonic()
        gone = 0.0  # how long a worker has been gone that may have been told to go
        while not done.wait(POLL):
            self.check(failed_only=gone < self.GRACE)
            gone = gone + POLL if any(worker.ended() for worker in self._workers()) else 0.0
            if time.monotonic() - start > timeout:
                living = [worker for worker in self._workers() if worker.ended() is None]
                stopped = [str(worker) for worker in living if worker.stopped()]
                if stopped:
                    raise WorkerError(
                        f"{self._name} did not bring {what} within {timeout:g} s: {', '.join(stopped)} was stopped "
                        "(SIGSTOP) and not continued"
                    )
                alive = [str(worker) for worker in living]
                raise WorkerError(
                    f"{self._name} did not bring {what} within {timeout:g} s"
                    f"{' although ' + ', '.join(alive) + ' live' if alive else ''}: a worker waits for something, or "
                    "the time limit (timeout=) is too short for this environment"
                )
        result, error = outcome
        if error is None:
            return result
        if isinstance(error, Exception):
            # An error of another kind may have made the collector end its workers.
            failed = self._failed(self._ending() and not _is_of_a_death(error))
            if failed is not None:
                raise self._death(failed) from error
        raise error

    def check(self, failed_only: bool = False) -> None:
        """Raise :class:`WorkerError` if a worker has ended; the one that failed by itself is named first."""
        # The exit codes before the question: whoever begins to end its workers says so before it does.
        ended = [worker for worker in self._workers() if worker.ended() is not None]
        failed = self._failed(self._ending()) if ended else None
        if failed is not None or (ended and not failed_only):
            raise self._death(failed or ended[0])

    def _failed(self, ending: bool) -> Worker | None:
        """A worker that ended by itself: rather one that TorchRL has not closed afterwards."""
        self._known |= {worker.pid: worker for worker in self._workers()}
        failed = [worker for worker in self._known.values() if worker.failed(ending)]
        # One that was killed by another signal, or ended with an error, was not ended by the collector.
        return next((one for one in failed if one.failed(ending=True)), failed[0] if failed else None)

    def _death(self, worker: Worker) -> WorkerError:
        return WorkerError(f"{worker} of {self._name} {worker.ended()}; the collector cannot go on without it")

    def _run(self) -> None:
        while True:
            function, outcome, done = self._calls.get()
            try:
                outcome.extend((function(), None))
            except BaseException as error:
                outcome.extend((None, error))
            done.set()


def _is_of_a_death(error: Exception) -> bool:
    """Whether an error is what TorchRL meets when a worker is gone."""
    words = ("process failed", "process object is closed")
    return isinstance(error, (EOFError, ConnectionError)) or any(one in str(error) for one in words)


def end(workers: Iterable[Worker], children: Iterable[tuple[int, str]] = (), patience: float = 2.0) -> None:
    """End processes: ask, wait for a moment, then kill; with the processes that they had started."""
    workers = list(workers)
    for force in (False, True):
        alive = [worker for worker in workers if worker.ended() is None]
        for worker in alive:
            with contextlib.suppress(ValueError, OSError):
                worker.process.kill() if force else worker.process.terminate()
        limit = time.monotonic() + patience
        for worker in alive:
            with contextlib.suppress(ValueError, AssertionError):
                worker.process.join(max(0.0, limit - time.monotonic()))
    left = [(pid, born) for pid, born in children if _birth(pid) == born]
    for pid, _ in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    limit = time.monotonic() + patience
    while any(_birth(pid) == born for pid, born in left) and time.monotonic() < limit:
        time.sleep(POLL)


def descendants(pids: Iterable[int]) -> set[tuple[int, str]]:
    """The processes below others, with the times of their birth; where there is no ``/proc``, none."""
    parents: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[tuple[int, str]] = set()
    below = [child for pid in pids for child in parents.get(pid, ())]
    while below:
        pid = below.pop()
        if (birth := _birth(pid)) is not None:
            found.add((pid, birth))
        below += parents.get(pid, ())
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _birth(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else None


def _describe(code: int | None) -> str:
    if code is None:
        return "was ended"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return "has returned" if code == 0 else f"ended with exit code {code} (its traceback went to standard error)"
