"""Where results are streamed while the agent trains: local files always, W&B or another logger beside them."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tdhook_rl.errors import ArtifactError, InputError

__all__ = ["FileSink", "LoggerSink", "Sink", "Sinks", "new_folder", "open_wandb"]

#: The axis of every curve; on W&B each name prefix gets a step axis of its own, so one prefix is used for all.
PREFIX = "interp"


class Sink(Protocol):
    """Takes scalars by name."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars measured at a step (environment frames so far)."""

    def close(self) -> None:
        """Finish; what was logged stays readable."""


class FileSink:
    """Scalars as ``step,name,value`` lines; each call is flushed, so that a stopped run leaves all it measured."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("x", newline="")
        except FileExistsError:
            raise ArtifactError(f"{self.path} exists already: another run is not overwritten") from None
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", "name", "value"])
        self._file.flush()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._writer.writerows([step, name, value] for name, value in metrics.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: str | Path) -> dict[str, list[tuple[int, float]]]:
        """The curves of a log file: ``(step, value)`` pairs by name."""
        curves: dict[str, list[tuple[int, float]]] = {}
        with Path(path).open(newline="") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
        return curves


class LoggerSink:
    """Any TorchRL ``Logger``, under the names ``interp/<name>`` and with the step as ``interp/step``."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        finite = {f"{PREFIX}/{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self.logger.log_metrics(finite, step=step)

    def close(self) -> None:
        finish = getattr(getattr(self.logger, "experiment", None), "finish", None)
        if callable(finish):
            finish()


class Sinks:
    """Several sinks as one. A sink that fails is dropped with one warning; the others go on."""

    def __init__(self, *sinks: Sink | None) -> None:
        self._sinks = [sink for sink in sinks if sink is not None]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for sink in list(self._sinks):
            try:
                sink.log(metrics, step)
            except Exception as error:
                if isinstance(sink, FileSink):
                    raise
                self._sinks.remove(sink)
                warnings.warn(f"{type(sink).__name__} stopped logging ({error}); the local files go on")

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                warnings.warn(f"{type(sink).__name__} did not close cleanly ({error})")


def open_wandb(folder: str | Path, name: str, config: Mapping[str, Any], mode: str = "offline") -> LoggerSink | None:
    """A W&B run in a folder, or ``None`` with one warning where W&B cannot start.

    Args:
        folder: where the run's files go.
        name: the name of the run.
        config: the settings of the run.
        mode: ``"offline"`` needs no account; upload it later with ``wandb sync``.
    """
    try:
        import wandb
        from torchrl.record.loggers.wandb import WandbLogger

        # mode= rather than offline=True, which would leave WANDB_MODE set for the whole process.
        logger = WandbLogger(
            exp_name=name,
            save_dir=str(folder),
            project="tdhook_rl",
            mode=mode,
            config=dict(config),
            log_env_packages=False,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
    except Exception as error:
        warnings.warn(f"W&B could not start ({type(error).__name__}: {error}); logging to local files only")
        return None
    return LoggerSink(logger)


def new_folder(path: str | Path) -> Path:
    """Create a folder for the output of one run.

    Raises:
        ArtifactError: if it holds something already, is a file, or cannot be written.
    """
    path = Path(path)
    if path.is_file():
        raise ArtifactError(f"{path} is a file: name a folder for the output")
    if path.is_dir() and any(path.iterdir()):
        raise ArtifactError(f"{path} holds the output of another run: name a new folder, or remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArtifactError(f"cannot write into {path}: {error.strerror}; name a folder you may write to") from error
    return path


def open_sinks(folder: Path, logger: str, name: str, config: Mapping[str, Any]) -> Sinks:
    """The local CSV file, and the logger asked for: ``"wandb"`` or ``"csv"``.

    Raises:
        InputError: for another logger.
    """
    if logger not in ("wandb", "csv"):
        raise InputError(f"the logger is 'wandb' or 'csv', got {logger!r}")
    return Sinks(FileSink(folder / "log.csv"), open_wandb(folder, name, config) if logger == "wandb" else None)
