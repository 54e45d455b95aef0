"""TorchRL's loggers, W&B runs and TensorBoard writers as sinks; what one cannot show stays a file."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError
from tdhook_rl.report.media import Animation, Artifact, DataTable, Histogram, Image, Media
from tdhook_rl.report.sinks.base import LoggerSink
from tdhook_rl.report.sinks.names import PREFIX, told_apart
from tdhook_rl.report.sinks.trackers import MlflowSink, TrackioSink

__all__ = ["TensorboardSink", "WandbSink", "sink_of"]


#: By run and prefix the run's step at which a row of ours is not ended, also where another sink goes on in the run.
_OPEN: weakref.WeakKeyDictionary[Any, dict[str, int | None]] = weakref.WeakKeyDictionary()


def _open_rows(run: Any) -> dict[str, int | None]:
    try:
        return _OPEN.setdefault(run, {})
    except TypeError:  # what cannot be referred to weakly
        return {}


def sink_of(logger: Any, prefix: str = PREFIX) -> LoggerSink:
    """The sink of a TorchRL ``Logger``, or of a run or writer that one has: W&B's, TensorBoard's, MLflow's, Trackio's.

    Raises:
        InputError: for anything else.
    """
    experiment = getattr(logger, "experiment", None)
    for one in (logger, experiment):
        if _is_of(one, "wandb", "Run"):
            return WandbSink(one, prefix=prefix, owner=logger)
        if callable(getattr(one, "add_histogram_raw", None)):
            return TensorboardSink(one, prefix=prefix, owner=logger)
        if _is_of(one, "mlflow", "ActiveRun"):
            return MlflowSink(one, prefix, owner=logger)
        if _is_of(one, "trackio", "Run"):
            return TrackioSink(one, prefix, owner=logger)
    if callable(getattr(logger, "log_metrics", None)) or callable(getattr(logger, "log_scalar", None)):
        return LoggerSink(logger, prefix=prefix)
    raise InputError(
        f"a {type(logger).__name__} is no logger: give a TorchRL Logger, a W&B run, a TensorBoard SummaryWriter, or "
        "the path of a folder"
    )


def _is_of(value: Any, package: str, name: str) -> bool:
    """Whether it is an object of a package's class, which not every release hands on at its top."""
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(value).__mro__)


class WandbSink(LoggerSink):
    """A W&B run, online, offline, disabled or resumed: one row for each call, with ``interp/step`` in it.

    The run's own step is never set. Each of our rows joins the one that is open, and stays open: what a script logs at
    the same step, before or afterwards, is in it too. A row of ours is ended by the next one only, where the script has
    not gone on meanwhile. So a step of the script's own that counts more slowly than our rows come is overtaken, and
    W&B drops what is behind: ``run.define_metric("loss", step_metric="epoch")`` is for such.
    """

    shows = (Histogram, Image, Animation, DataTable, Artifact)

    def __init__(self, run: Any, prefix: str = PREFIX, *, owner: Any = None, finish: bool = False) -> None:
        super().__init__(run, prefix, owner=owner, finish=finish)
        self.prompt = True
        self._open = _open_rows(run)
        run.define_metric(f"{self.prefix}/step", hidden=True)
        run.define_metric(f"{self.prefix}/*", step_metric=f"{self.prefix}/step")

    def describe(self, config: Mapping[str, Any]) -> None:
        self.logger.config.update({self.prefix: dict(config)}, allow_val_change=True)

    def summarise(self, values: Mapping[str, Any]) -> None:
        self.logger.summary.update({self._tags[name]: value for name, value in values.items() if value == value})

    def _send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> None:
        run = self.logger
        for tag, one in media.items():
            if isinstance(one, Artifact):
                run.log_artifact(_artifact(tag, one, step), aliases=[*one.aliases, f"f{step}"])
        payload = {**values, **{tag: _shown(one) for tag, one in media.items() if not isinstance(one, Artifact)}}
        if not payload:
            return
        now = self._step()
        if now is not None and self._open.get(self.prefix) == now:
            run.log({}, commit=True)
            now += 1
        run.log({**payload, f"{self.prefix}/step": step}, commit=now is None)
        self._open[self.prefix] = now

    def _step(self) -> int | None:
        """The run's step; ``None`` where it has none of its own (``mode="shared"``), or does not say it."""
        self.logger.log({}, commit=False)  # of a finished run an error at once, where its step would be waited for
        try:
            return int(self.logger.step)
        except Exception:
            return None


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

    name = told_apart("".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in tag), tag)
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
