"""Processes are killed, ended or stopped at random moments of collecting, analysing, logging; none is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchrl.collectors import MultiSyncCollector

from tdhook_rl import ActivationCaching
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import TdhookError, WorkerError
from tdhook_rl.report import FileSink, Image
from tdhook_rl.report.sinks import FolderSink
from tdhook_rl.rollout import Guarded
from tests.faults.agents import SITE, actor, env
from tests.faults.crashes import _read, _whole
from tests.faults.fault import NAMED, RESUMABLE, WHOLE, Fault, Kind, Wrong
from tests.faults.writers import _BUFFER, Writer, analysed
from tests.faults.writers import WRITERS as BY_ROOM

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}
#: How many moments of each program and signal, and of each collector.
MOMENTS, MOMENTS_OF_WORKERS = 12, 2
#: Seconds that a fault may take where worker processes have to start.
SLOW = 240.0
#: Seconds until workers have started, and until processes that lost their parent have to be gone: of a busy machine.
STARTED, GONE = 150.0, 60.0


def kinds() -> dict[str, Kind]:
    """Of one process that writes; of workers; and of the process that has workers."""
    return {"signals while writing": _writing, "signals to workers": _workers, "signals beside workers": _main}


# ------------------------------------------------------------------ one process


def _log(folder: Path) -> None:
    """A log that grows for ever."""
    sink = FolderSink(folder / "run", resume=True)
    for step in range(1_000_000):
        sink.log({"value": step * 0.5, "map": Image(torch.zeros(2, 2).numpy())}, step)


def _logged(folder: Path, rng: random.Random) -> str:
    if not (folder / "run" / "log.csv").exists():
        return RESUMABLE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a line that was cut
        curve = FileSink.read(folder / "run" / "log.csv").get("value", [])
    if curve != [(step, step * 0.5) for step in range(len(curve))]:
        raise Wrong(f"the log is {curve[:3]} ...")
    sink = FolderSink(folder / "run", resume=True)
    sink.log({"value": -1.0}, len(curve))
    sink.close()
    if FileSink.read(folder / "run" / "log.csv")["value"] != [*curve, (len(curve), -1.0)]:
        raise Wrong("the log does not go on")
    return RESUMABLE


def _save(folder: Path) -> None:
    """An artifact that is replaced for ever."""
    for number in range(1_000_000):
        save_artifact(folder / "a", "kind", {"x": torch.full((200,), float(number))}, {"number": number})


def _saved(folder: Path, rng: random.Random) -> str:
    if not (folder / "a.safetensors").exists():
        return RESUMABLE
    tensors, facts = load_artifact(folder / "a", "kind")
    if not bool((tensors["x"] == facts["number"]).all()):
        raise Wrong("an artifact is half of one and half of another")
    json.loads((folder / "a.json").read_text()) if (folder / "a.json").exists() else None
    return RESUMABLE


_EXPECTED: dict[str, Any] = {}


def _analysis(folder: Path) -> None:
    while True:
        place = folder / str(len(list(folder.iterdir())))
        analysed(place / "found")


def _goes_on(folder: Path, rng: random.Random) -> str:
    last = folder / str(len(list(folder.iterdir())) - 1) if list(folder.iterdir()) else folder / "0"
    analysed(last / "found")
    if _whole(last / "found") != _EXPECTED["analysis"]:
        raise Wrong("the analysis that goes on gives something else")
    return RESUMABLE


def _swept(writer: Writer, folder: Path) -> None:
    while True:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        writer.write(place)


def _again(writer: Writer, name: str, folder: Path, rng: random.Random) -> str:
    last = folder / str(max(0, len(list(folder.iterdir())) - 1))
    last.mkdir(exist_ok=True)
    try:
        writer.write(last)
    except TdhookError:
        return NAMED
    if writer.read(last) != _EXPECTED[name]:
        raise Wrong("the same call again gives something else")
    return RESUMABLE


def _programs(folder: Path) -> dict[str, tuple[Callable[[Path], None], Callable[[Path, random.Random], str]]]:
    analysed(folder / "whole" / "found")
    _EXPECTED["analysis"] = _read(folder / "whole" / "found")
    found: dict[str, Any] = {"logging": (_log, _logged), "saving": (_save, _saved), "analysing": (_analysis, _goes_on)}
    for room, name in (("sweeps", "a sweep"), ("replay", "a data set of Parquet")):
        writer = BY_ROOM[room][name]
        (folder / name).mkdir()
        writer.write(folder / name)
        _EXPECTED[name] = writer.read(folder / name)
        found[name] = partial(_swept, writer), partial(_again, writer, name)
    return found


def _writing(folder: Path) -> Iterator[Fault]:
    for name, (program, look) in _programs(folder).items():
        for word, number in SIGNALS.items():
            for moment in range(MOMENTS):
                yield Fault(f"{name}: {word} at moment {moment}", partial(_signal, program, look, number, moment, name))


def _signal(
    program: Callable[[Path], None], look: Callable[[Path, random.Random], str], number: int, moment: int, name: str,
    folder: Path,
) -> str:  # fmt: skip
    rng = random.Random(f"{name} {number} {moment}")
    child = _fork(lambda: program(folder))
    try:
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(child, number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(child, signal.SIGCONT)
            time.sleep(0.05)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (-signal.SIGKILL, -signal.SIGTERM):
            raise Wrong(f"it ended with {status}")
    finally:
        _require_none_of(child)
    return look(folder, rng)


def _fork(run: Callable[[], None]) -> int:
    """A process with a session of its own, which all that it starts belong to."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _BUFFER.clear()  # whose lock is shared by processes: who is killed with it would keep it
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 0)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    return child


def _of_session(leader: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == leader and state != "Z":
                    found.append(int(path.name))
    return found


def _require_none_of(leader: int, seconds: float = GONE) -> None:
    end = time.monotonic() + seconds
    while (left := _of_session(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        raise Wrong(f"processes are left: {left}")


# ------------------------------------------------------------------ workers


def _collector() -> MultiSyncCollector:
    policy = ActivationCaching(SITE).prepare(actor(), return_context=False)
    return MultiSyncCollector([_env, _env], policy, frames_per_batch=16, total_frames=-1)


def _env() -> Any:
    torch.set_num_threads(1)
    return env()


def _workers(folder: Path) -> Iterator[Fault]:
    for word, number in SIGNALS.items():
        for moment in range(MOMENTS_OF_WORKERS):
            yield Fault(f"collecting: {word} to a worker at moment {moment}", partial(_worker, number, moment), SLOW)


def _worker(number: int, moment: int, folder: Path) -> str:
    """A worker is named, and none is left; or, where it was only stopped and goes on, batches come."""
    rng = random.Random(f"worker {number} {moment}")
    at = rng.randrange(3)

    def collect() -> None:
        collector = _collector()
        ending = "no error"
        try:
            with Guarded(collector, timeout=STARTED) as guarded:
                for count, _ in enumerate(guarded):
                    guarded.timeout = 4.0
                    if count == at:
                        victim = rng.choice(collector.procs)
                        time.sleep(rng.uniform(0, 0.02))
                        os.kill(victim.pid, number)
                    if count > 2000:
                        break
        except WorkerError as error:
            ending = str(error)
        (folder / "ending").write_text(ending)

    child = _fork(collect)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        _require_none_of(child)
    words = (folder / "ending").read_text() if (folder / "ending").exists() else f"it ended with {status}"
    expected = "was stopped (SIGSTOP)" if number == signal.SIGSTOP else f"was killed by {signal.Signals(number).name}"
    if "worker " not in words or expected not in words:
        raise Wrong(words)
    return NAMED


def _main(folder: Path) -> Iterator[Fault]:
    for word in ("SIGKILL", "SIGTERM", "SIGINT"):
        for moment in range(MOMENTS_OF_WORKERS):
            yield Fault(f"collecting: {word} to the process with the workers, at moment {moment}",
                        partial(_beside_workers, getattr(signal, word), moment), SLOW)  # fmt: skip


def _beside_workers(number: int, moment: int, folder: Path) -> str:
    """What was logged can be read, and the workers end by themselves."""
    rng = random.Random(f"main {number} {moment}")
    started = folder / "started"

    def collect() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sink = FileSink(folder / "log.csv")
        with Guarded(_collector(), timeout=STARTED) as guarded:
            for count, _ in enumerate(guarded):
                sink.log({"value": count * 0.5}, count)
                started.touch()

    child = _fork(collect)
    try:
        end = time.monotonic() + STARTED
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.02)
        if len(_of_session(child)) < 3:
            raise Wrong("the workers are not there")
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, number)
        os.waitpid(child, 0)
    finally:
        _require_none_of(child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curve = FileSink.read(folder / "log.csv")["value"]
    if not curve or curve != [(step, step * 0.5) for step in range(len(curve))]:
        raise Wrong(f"the log is {curve[:3]} ...")
    return WHOLE
