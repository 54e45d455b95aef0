"""Several sinks as one, and how they are opened."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tdhook_rl.errors import warn
from tdhook_rl.files.durable import FolderInUse
from tdhook_rl.report.media import Media
from tdhook_rl.report.sinks.base import LoggerSink
from tdhook_rl.report.sinks.file import FileSink
from tdhook_rl.report.sinks.folder import FolderSink
from tdhook_rl.report.sinks.loggers import WandbSink, sink_of
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.report.sinks.patient import Patient
from tdhook_rl.report.sinks.values import sorted_values

__all__ = ["Sink", "Sinks", "open_wandb", "sinks_of"]


#: Seconds that W&B is waited for; its own limit is three times as long.
LONGEST_START = 30


class Sink(Protocol):
    """Takes values by name."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write what was measured at a step (environment frames so far)."""

    def close(self) -> None:
        """Finish; what was logged stays readable."""


class Sinks:
    """Several sinks as one: local files first, then the others, whose failing or being slow stops nothing.

    Args:
        *sinks: ``None`` is left out.
        most_keys: how many names the others are given; the local files take all.
        patience: seconds that each of the others is waited for.
    """

    def __init__(self, *sinks: Sink | None, most_keys: float = float("inf"), patience: float = 1.0) -> None:
        given = [sink for sink in sinks if sink is not None]
        self.local: list[Any] = [sink for sink in given if isinstance(sink, FileSink | FolderSink)]
        self.others = [Patient(sink, patience=patience) for sink in given if sink not in self.local]
        self._most = most_keys
        self._names: set[str] = set()
        self._told = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log with each sink: numbers, and the kinds of :mod:`tdhook_rl.report.media`.

        Raises:
            InputError: for what is neither, and names that are none.
        """
        number, values, media = sorted_values(metrics, step)
        for sink in self.local:
            sink.log(values if isinstance(sink, FileSink) else {**values, **media}, number)
        chosen = {name: value for name, value in {**values, **media}.items() if self._within(name)}
        for other in self.others if chosen else ():
            other.log(chosen, number)
        if len(chosen) < len(values) + len(media) and not self._told:
            self._told = True
            said = (
                f"there are more than {self._most:g} names to log (budget): {_first_left(chosen, values, media)!r} and "
                "others are in the local files only"
            )
            self.note(said)
            warn(said)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write what the run is where there is a place for it."""
        self._all("describe", config)

    def note(self, text: str) -> None:
        """Keep what a reader of the run has to know, in the local folders."""
        for sink in self.local:
            if isinstance(sink, FolderSink):
                sink.note(text)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Write the last values where there is a place for them."""
        self._all("summarise", values)

    def close(self) -> None:
        """Finish all of them; what was logged stays readable."""
        for other in self.others:
            other.close()
        for sink in self.local:
            sink.close()

    def _all(self, method: str, content: Mapping[str, Any]) -> None:
        for sink in self.local:
            if hasattr(sink, method):
                getattr(sink, method)(content)
        shown = {name: one for name, one in content.items() if method == "describe" or name in self._names}
        for other in self.others:
            job: Callable[[Any], None] | None = getattr(other.sink, method, None)
            if job is not None:
                other.call(lambda job=job: job(shown))

    def _within(self, name: str) -> bool:
        if name not in self._names and len(self._names) < self._most:
            self._names.add(name)
        return name in self._names


def _first_left(chosen: Mapping[str, Any], values: Mapping[str, float], media: Mapping[str, Media]) -> str:
    return next(name for name in (*values, *media) if name not in chosen)


def sinks_of(
    logger: Any,
    folder: str | Path | None = None,
    *,
    prefix: str = PREFIX,
    resume: bool = False,
    most_keys: float = float("inf"),
    most_bytes: float = float("inf"),
) -> Sinks:
    """A folder and whatever was given: a TorchRL ``Logger``, a W&B run, the path of a folder, or several of these.

    Args:
        logger: ``None`` for local files only; a sink, as of :func:`open_wandb`, is taken as it is.
        folder: where local files go; beside what the first logger writes, unless given.
        prefix: the first level of names.
        resume: go on in a folder that was given, and has a log already.
        most_keys: see :class:`Sinks`.
        most_bytes: see :class:`FolderSink`.
    """
    given = list(logger) if isinstance(logger, list | tuple) else [logger]
    given = [one for one in given if one is not None]
    paths = [Path(one) for one in given if isinstance(one, str | Path)]
    others = [one for one in given if not isinstance(one, str | Path)]
    loggers = [one if isinstance(one, LoggerSink) else sink_of(one, prefix) for one in others]
    try:
        if folder is not None:
            paths.insert(0, Path(folder))
        if paths:
            local = [FolderSink(path, resume=resume, most_bytes=most_bytes) for path in dict.fromkeys(paths)]
        else:
            first = loggers[0] if loggers else None
            beside = folders_beside(
                first.logger if first and first.keeps_files else None, first.prefix if first else prefix
            )
            local = [_first_free(beside, most_bytes)]
    except Exception:
        for sink in loggers:
            sink.close()  # gives the prefix back
        raise
    return Sinks(*local, *loggers, most_keys=most_keys)


def folders_beside(logger: Any, prefix: str = PREFIX) -> Iterator[Path]:
    """Where the local files of a logger may go: ``interp`` in the folder that it writes, else a new one in ``runs``.

    Those after the first are for where another run writes into it.
    """
    run = getattr(logger, "experiment", logger)
    settings = getattr(run, "settings", None)
    known: Iterable[Any] = (
        getattr(settings, "sync_dir", None) if not getattr(run, "disabled", False) else None,
        getattr(run, "log_dir", None),
        getattr(logger, "log_dir", None),
    )
    for place in known:
        if isinstance(place, str | Path) and str(place) and Path(place).is_dir():
            yield Path(place) / prefix
            yield from (Path(place) / f"{prefix}{number}" for number in itertools.count(2))
    start = Path("runs") / time.strftime(f"{prefix}-%Y%m%d-%H%M%S")
    others = (start.with_name(f"{start.name}-{number}") for number in itertools.count(2))
    yield from (path for path in itertools.chain([start], others) if not path.exists())


def _first_free(places: Iterator[Path], most_bytes: float) -> FolderSink:
    """The first folder that no other run writes into; where that is another than the first, it is said."""
    taken: FolderInUse | None = None
    while True:
        path = next(places)
        try:
            sink = FolderSink(path, resume=True, most_bytes=most_bytes)
        except FolderInUse as error:
            taken = taken or error
            continue
        if taken is not None:
            warn(f"{str(taken).partition(': ')[0]}: the local files of this one go to {path}")
        return sink


def open_wandb(
    folder: str | Path, name: str, config: Mapping[str, Any], mode: str = "offline", group: str | None = None
) -> WandbSink | None:
    """A W&B run in a folder. Closing the sink ends the run.

    Where a run cannot be online (no account, another key, no network), it is offline, which is said; ``None`` with a
    warning where W&B cannot start at all.

    Args:
        folder: where the run's files go.
        name: the name of the run.
        config: the settings of the run.
        mode: ``"offline"`` needs no account; upload it later with ``wandb sync``.
        group: the experiment that it is one run of.
    """
    for tried in dict.fromkeys((mode, "offline")):
        try:
            return _open_wandb(Path(folder), name, config, tried, group)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            other = "local files only" if tried == "offline" else "an offline run, which `wandb sync` uploads later"
            warn(f"W&B could not start {tried} ({reason}); logging to {other}")
    return None


def _open_wandb(folder: Path, name: str, config: Mapping[str, Any], mode: str, group: str | None) -> WandbSink:
    import wandb
    from torchrl.record.loggers.wandb import WandbLogger

    # mode= rather than offline=True, which would leave WANDB_MODE set for the whole process.
    quiet = {"silent": True, "console": "off", "disable_git": True, "x_disable_stats": True}
    logger = WandbLogger(
        exp_name=name,
        save_dir=str(folder),
        project="tdhook_rl",
        mode=mode,
        group=group,
        config=dict(config),
        log_env_packages=False,
        settings=wandb.Settings(**quiet, init_timeout=LONGEST_START),
    )
    return WandbSink(logger.experiment, owner=logger, finish=True)
