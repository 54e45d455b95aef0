"""TorchRL's loggers, W&B runs and TensorBoard writers as sinks; what one cannot show stays a file."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl.errors import InputError, warn
from tdhook_rl.report.media import Animation, Artifact, DataTable, Histogram, Image, Media
from tdhook_rl.report.sinks.names import PREFIX, Tags, claim, leads, release
from tdhook_rl.report.sinks.values import sorted_values

__all__ = ["LoggerSink", "TensorboardSink", "WandbSink", "sink_of"]


def sink_of(logger: Any, prefix: str = PREFIX) -> LoggerSink:
    """The sink of a TorchRL ``Logger``, a W&B run or a TensorBoard ``SummaryWriter``.

    Raises:
        InputError: for anything else.
    """
    experiment = getattr(logger, "experiment", None)
    wandb = sys.modules.get("wandb")  # nobody has a run of what nobody has imported
    for one in (logger, experiment):
        if wandb is not None and isinstance(one, wandb.Run):
            return WandbSink(one, prefix=prefix, owner=logger)
        if callable(getattr(one, "add_histogram_raw", None)):
            return TensorboardSink(one, prefix=prefix, owner=logger)
    if callable(getattr(logger, "log_metrics", None)) or callable(getattr(logger, "log_scalar", None)):
        return LoggerSink(logger, prefix=prefix)
    raise InputError(
        f"a {type(logger).__name__} is no logger: give a TorchRL Logger, a W&B run, a TensorBoard SummaryWriter, or "
        "the path of a folder"
    )


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
            self._say(f"{self.name} shows no {type(value).__name__.lower()}: {name!r} and others like it are {place}")
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


class WandbSink(LoggerSink):
    """A W&B run, online, offline, disabled or resumed: one row for each call, with ``interp/step`` in it.

    The run's own step is never set: whoever sets it goes on doing so, and is not overtaken, as each of our rows joins
    the one that is open, and only the first of several sinks on one run ends it.
    """

    shows = (Histogram, Image, Animation, DataTable, Artifact)

    def __init__(self, run: Any, prefix: str = PREFIX, *, owner: Any = None, finish: bool = False) -> None:
        super().__init__(run, prefix, owner=owner, finish=finish)
        self.prompt = True
        self._open: int | None = None  # the run's step at which a row of ours is not ended yet
        run.define_metric(f"{self.prefix}/step", hidden=True)
        run.define_metric(f"{self.prefix}/*", step_metric=f"{self.prefix}/step")

    def describe(self, config: Mapping[str, Any]) -> None:
        self.logger.config.update({self.prefix: dict(config)}, allow_val_change=True)

    def summarise(self, values: Mapping[str, Any]) -> None:
        self.logger.summary.update({self._tags[name]: value for name, value in values.items() if value == value})

    def close(self) -> None:
        if self._open is not None and self._open == self.logger.step:
            self.logger.log({}, commit=True)
        super().close()

    def _send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> None:
        run = self.logger
        for tag, one in media.items():
            if isinstance(one, Artifact):
                run.log_artifact(_artifact(tag, one, step), aliases=[*one.aliases, f"f{step}"])
        payload = {**values, **{tag: _shown(one) for tag, one in media.items() if not isinstance(one, Artifact)}}
        if not payload:
            return
        # What was logged at this step of the run, and is open still, would be written over. (To ask a run for its step
        # is a question to another process, which a finished run does not answer.)
        ends = leads(run, self.prefix) or self._open == run.step
        self._open = None if ends else run.step
        run.log({**payload, f"{self.prefix}/step": step}, commit=ends)


def _shown(value: Media) -> Any:
    import wandb

    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(value.counts, value.edges))
    if isinstance(value, Image):
        return wandb.Image(str(value.path) if value.path else value.pixels, caption=value.caption or None)
    if isinstance(value, Animation):  # from its file, which needs no further package
        return wandb.Video(str(value.path), format="gif", caption=value.caption or None)
    assert isinstance(value, DataTable)
    return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows], allow_mixed_types=True)


def _artifact(tag: str, value: Artifact, step: int) -> Any:
    import wandb

    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in tag)
    facts = {**value.facts, "step": step, "local": str(value.path)}
    artifact = wandb.Artifact(name, type=value.kind, metadata=facts)
    folder = value.path if isinstance(value.path, Path) else None
    for file in value.files:
        artifact.add_file(str(folder / file.name if folder else file), name=file.name)
    return artifact


class TensorboardSink(LoggerSink):
    """A TensorBoard ``SummaryWriter``: numbers, histograms and images."""

    shows = (Histogram, Image)
    _other = r"[^-\w.]"

    def __init__(self, writer: Any, prefix: str = PREFIX, *, owner: Any = None, finish: bool = False) -> None:
        super().__init__(writer, prefix, owner=owner, finish=finish)
        self.prompt = True

    def _send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> None:
        writer = self.logger
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        for tag, one in media.items():
            if isinstance(one, Image):
                writer.add_image(tag, one.pixels, step, dataformats="HWC")
            else:
                self._histogram(tag, one, step)
        writer.flush()

    def _histogram(self, tag: str, value: Histogram, step: int) -> None:
        counts, edges = value.counts.astype(float), value.edges
        middles = (edges[:-1] + edges[1:]) / 2
        self.logger.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
