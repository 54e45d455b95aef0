"""What all sinks of loggers share: names, what a backend shows, and how it is told that it does not."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl.errors import warn
from tdhook_rl.report.media import Animation, Artifact, Media
from tdhook_rl.report.sinks.names import PREFIX, Tags, claim, release
from tdhook_rl.report.sinks.values import sorted_values

__all__ = ["LoggerSink"]


class LoggerSink:
    """Any TorchRL ``Logger``: numbers that are finite, under the names ``interp/<name>``, at their step.

    Pictures, tables and files are left to the run's folder, which is said once for each kind.

    Args:
        logger: the logger; it stays open, as whoever made it may go on using it, unless ``finish``.
        prefix: the first level of the names; another where something of ours uses it in this logger already.
        owner: what it was got from, for messages.
        finish: whether closing the sink ends the logger's experiment.

    Attributes:
        words: what is to be said by whoever runs the sink in a thread.
        prompt: whether logging only hands over to a process, a thread or a file, and so waits for nobody.
    """

    shows: tuple[type[Media], ...] = ()
    keeps_files = True  # whether the logger says in which folder it writes
    _other = r"[\x00-\x1f]"

    def __init__(self, logger: Any, prefix: str = PREFIX, *, owner: Any = None, finish: bool = False) -> None:
        self.logger = logger
        self.name = type(owner if owner is not None else logger).__name__
        self.prefix = claim(logger, prefix)
        self._finish = finish
        self._tags = Tags(self.prefix, self._other)
        self._said: set[type] = set()
        self.words: list[str] = []
        self.prompt = isinstance(logger, CSVLogger)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log what is finite and can be shown."""
        number, values, media = sorted_values(metrics, step)
        finite = {self._tags[name]: value for name, value in values.items() if math.isfinite(value)}
        self._send(finite, {self._tags[name]: one for name, one in media.items() if self._can(name, one)}, number)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Keep what the run is, where there is a place for it."""

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Keep the last values, where there is a place for them."""

    def close(self) -> None:
        """End the logger's experiment if it is ours to end, and give the prefix back."""
        release(self.logger, self.prefix)
        if not self._finish:
            return
        finish = getattr(getattr(self.logger, "experiment", self.logger), "finish", None)
        if callable(finish):
            finish()

    def _can(self, name: str, value: Media) -> bool:
        if isinstance(value, self.shows) and (value.path is not None or not isinstance(value, Animation | Artifact)):
            return True
        if not isinstance(value, self.shows) and type(value) not in self._said:
            self._said.add(type(value))
            place = f"in {value.path.parent}" if value.path is not None else "left out"
            self._say(f"{self.name} shows no {value.called}: {name!r} and others like it are {place}")
        return False

    def _say(self, words: str) -> None:
        """Warn; from a thread that works for another, that one does, at the line that is to be named."""
        if threading.current_thread() is threading.main_thread():
            warn(words)
        else:
            self.words.append(words)

    def _send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> None:
        if not values:
            return
        if callable(getattr(self.logger, "log_metrics", None)):
            self.logger.log_metrics(dict(values), step=step)
        else:
            for name, value in values.items():
                self.logger.log_scalar(name, value, step=step)
