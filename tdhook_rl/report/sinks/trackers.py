"""MLflow and Trackio runs as sinks: what these show of pictures, tables and files, in whatever thread is at hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdhook_rl.report.media import Animation, Artifact, DataTable, Histogram, Image, Media
from tdhook_rl.report.sinks.base import LoggerSink
from tdhook_rl.report.sinks.names import PREFIX, told_apart

__all__ = ["MlflowSink", "TrackioSink"]


class MlflowSink(LoggerSink):
    """An MLflow run: numbers and images by step; tables, animations and files as its artifacts.

    MLflow's functions log into the active run of the thread that calls them, so the run is named here.

    Args:
        run: the run, as TorchRL's ``MLFlowLogger`` has it in ``experiment``.
        prefix: the first level of the names.
        owner: what the run was got from.
    """

    shows = (Image, Animation, DataTable, Artifact)
    keeps_files = False
    _other = r"[^-A-Za-z0-9_. ]"
    _at_once = 1000  # MLflow's limit

    def __init__(self, run: Any, prefix: str = PREFIX, *, owner: Any) -> None:
        import mlflow

        super().__init__(owner, prefix)
        self._client, self._run = mlflow.MlflowClient(), run.info.run_id

    def describe(self, config: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run, dict(config), f"{self.prefix}/config.json")
        self._client.set_tag(self._run, f"{self.prefix}.methods", "; ".join(config.get("methods", ()))[:5000])

    def _send(self, values: Mapping[str, float], media: Mapping[str, Media], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(tag, value, now, step) for tag, value in values.items()]
        for start in range(0, len(metrics), self._at_once):
            self._client.log_batch(self._run, metrics[start : start + self._at_once])
        for tag, one in media.items():
            if isinstance(one, Image):
                self._client.log_image(self._run, one.pixels, key=tag, step=step, synchronous=True)
            elif isinstance(one, Artifact):
                for file in _files(one):
                    self._client.log_artifact(self._run, str(file), f"{tag}/{step:09d}")
            elif one.path is not None:
                self._client.log_artifact(self._run, str(one.path), tag)
            else:
                self._client.log_text(self._run, one.content().decode(), f"{tag}/{step:09d}{one.ending}")


class TrackioSink(LoggerSink):
    """A Trackio run: one row for each call, at its step.

    Args:
        run: the run, as TorchRL's ``TrackioLogger`` has it in ``experiment``.
        prefix: the first level of the names.
        owner: what the run was got from.
    """

    shows = (Histogram, Image, Animation, DataTable, Artifact)
    keeps_files = False

    def __init__(self, run: Any, prefix: str = PREFIX, *, owner: Any) -> None:
        super().__init__(owner, prefix)
        self._run = run

    def describe(self, config: Mapping[str, Any]) -> None:
        self._run.config.update({self.prefix: dict(config)})

    def _send(self, values: Mapping[str, float], media: Mapping[str, Media], step: int) -> None:
        shown = {tag: _shown(one) for tag, one in media.items() if not isinstance(one, Artifact)}
        if values or shown:
            self._run.log({**values, **shown}, step=step)
        for tag, one in media.items():
            if isinstance(one, Artifact):
                self._run.log_artifact(_artifact(tag, one, step), aliases=[*one.aliases[1:], f"f{step}"])


def _shown(value: Media) -> Any:
    import trackio

    if isinstance(value, Histogram):
        return trackio.Histogram(np_histogram=(value.counts, value.edges))
    if isinstance(value, Image):
        return trackio.Image(value.pixels, caption=value.caption or None)
    if isinstance(value, Animation):
        return trackio.Video(str(value.path), caption=value.caption or None)
    assert isinstance(value, DataTable)
    return trackio.Table(columns=list(value.columns), data=[list(row) for row in value.rows])


def _artifact(tag: str, value: Artifact, step: int) -> Any:
    import trackio

    name = told_apart("".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in tag), tag)
    artifact = trackio.Artifact(name, type=value.kind, metadata={**value.facts, "step": step})
    for file in _files(value):
        artifact.add_file(file)
    return artifact


def _files(value: Artifact) -> list[Path]:
    """Its files, where they are kept."""
    return [value.path / Path(file).name if value.path is not None else Path(file) for file in value.files]
