"""Where results are streamed while the agent trains: local files always, W&B or another logger beside them."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from tdhook_rl.errors import ArtifactError, InputError, warn

__all__ = ["FileSink", "LoggerSink", "Sink", "Sinks", "new_folder", "open_wandb"]

#: The axis of every curve; on W&B each name prefix gets a step axis of its own, so one prefix is used for all.
PREFIX = "interp"
COLUMNS = ("step", "name", "value")
_STEP = re.compile(r"-?[0-9]{1,30}")
_VALUE = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|inf|nan)")


class Sink(Protocol):
    """Takes scalars by name."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars measured at a step (environment frames so far)."""

    def close(self) -> None:
        """Finish; what was logged stays readable."""


class FileSink:
    """Scalars as ``step,name,value`` lines; each call is written at once, so that a stopped run leaves all it measured.

    Where the disk is full, what cannot be written is left out, whole; a warning says so once, and the log goes on as
    soon as there is room.

    Args:
        path: a new file.

    Raises:
        ArtifactError: if it exists already, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._told = False
        try:
            self._file = self.path.open("xb", buffering=0)
        except FileExistsError:
            raise ArtifactError(f"{self.path} exists already: another run is not overwritten") from None
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            self._write(f"{','.join(COLUMNS)}\n")
        except OSError as error:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write scalars; as of :func:`scalars`."""
        text = io.StringIO()
        number, values = scalars(metrics, step)
        csv.writer(text, lineterminator="\n").writerows([number, name, repr(value)] for name, value in values.items())
        try:
            self._write(text.getvalue())
        except OSError as error:
            if not self._told:
                self._told = True
                warn(
                    f"{self.path} cannot be written ({error.strerror}): what is measured from step {number} on is not "
                    "in it, until there is room"
                )

    def _write(self, text: str) -> None:
        """Write all of a text or, as far as that is possible, nothing of it."""
        start = os.fstat(self._file.fileno()).st_size
        content = memoryview(text.encode())
        try:
            while len(content):
                content = content[self._file.write(content) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
                self._file.seek(start)
            raise

    def close(self) -> None:
        """Finish; what was logged stays readable."""
        self._file.close()

    @staticmethod
    def read(path: str | Path) -> dict[str, list[tuple[int, float]]]:
        """The curves of a log file: ``(step, value)`` pairs by name.

        Lines that were cut (a full disk, a run that was killed while it wrote) are left out with one warning: a number
        that was cut is another number.

        Raises:
            ArtifactError: if there is no such file, or it is no log.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no log {path}")
        curves: dict[str, list[tuple[int, float]]] = {}
        odd: list[int] = []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    row = _fields(line)
                    if number == 1:
                        _require_log(path, line, row)
                        odd += [] if row is not None else [number]
                    elif row is None or (entry := _entry(row)) is None:
                        odd.append(number)
                    else:
                        curves.setdefault(row[1], []).append(entry)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
        if odd:
            shown = ", ".join(map(str, odd[:5])) + (", ..." if len(odd) > 5 else "")
            lines = f"line {shown} was" if len(odd) == 1 else f"{len(odd)} lines ({shown}) were"
            warn(f"of {path} {lines} cut and left out; the rest is read")
        return curves


class LoggerSink:
    """Any TorchRL ``Logger``, under the names ``interp/<name>`` and with the step as ``interp/step``."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log what is finite; as of :func:`scalars`."""
        number, values = scalars(metrics, step)
        finite = {f"{PREFIX}/{name}": value for name, value in values.items() if math.isfinite(value)}
        self.logger.log_metrics(finite, step=number)

    def close(self) -> None:
        finish = getattr(getattr(self.logger, "experiment", None), "finish", None)
        if callable(finish):
            finish()


class Sinks:
    """Several sinks as one. A sink that fails is dropped with one warning; the others go on."""

    def __init__(self, *sinks: Sink | None) -> None:
        self._sinks = [sink for sink in sinks if sink is not None]

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log with each sink; as of :func:`scalars`, whose errors are the caller's."""
        number, values = scalars(metrics, step)
        for sink in list(self._sinks):
            try:
                sink.log(values, number)
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


def scalars(metrics: Mapping[str, Any], step: Any) -> tuple[int, dict[str, float]]:
    """The step, and the metrics as numbers: numbers, and tensors and arrays of one element.

    Raises:
        InputError: that names what is no number, or no name.

    Example:
        >>> import torch
        >>> scalars({"loss": torch.tensor([0.25])}, 3)
        (3, {'loss': 0.25})
    """
    found = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not name or set(name) & set("\n\r\0"):
            raise InputError(f"a metric is named by a text of one line, not by {name!r}")
        found[name] = _number(value, f"the metric {name!r}")
    number = _number(step, "the step")
    if not number.is_integer():
        raise InputError(f"the step is a whole number, got {step!r}")
    return int(step), found


def _number(value: Any, what: str) -> float:
    original = value
    if hasattr(value, "numel") or hasattr(value, "size"):  # tensors and arrays
        count = value.numel() if callable(getattr(value, "numel", None)) else value.size
        if count != 1:
            raise InputError(
                f"{what} is a {type(value).__name__} of shape {tuple(value.shape)}: log a number, such as its mean"
            )
        value = value.item()
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{what} is {str(original)[:80]!r} ({type(original).__name__}), which is no number")


def _fields(line: bytes) -> list[str] | None:
    """The fields of a line; ``None`` for one without an end, or that is no text."""
    try:
        if not line.endswith((b"\n", b"\r")) or b"\0" in line:
            return None
        return next(csv.reader([line.decode()]), None)
    except (UnicodeDecodeError, csv.Error):
        return None


def _entry(row: list[str]) -> tuple[int, float] | None:
    if len(row) != 3 or not _STEP.fullmatch(row[0]) or not row[1] or not _VALUE.fullmatch(row[2]):
        return None
    return int(row[0]), float(row[2])


def _require_log(path: Path, line: bytes, row: list[str] | None) -> None:
    header = ",".join(COLUMNS).encode()
    if row != list(COLUMNS) and not (row is None and header.startswith(line)):
        raise ArtifactError(f"{path} is no log: it does not begin with {header.decode()!r}")


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
