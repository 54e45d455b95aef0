"""Results as Parquet: one file, or a data set in the layout of LeRobot (v3.0), and back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import ArgumentError, ArtifactError, MissingKeyError, nearest
from tdhook_rl.files.durable import write_text
from tdhook_rl.reading.parquet_rows import (
    KEYS,
    Column,
    columns_of,
    opened,
    parquet_files,
    reading,
    require_pyarrow,
    row_tensors,
)
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.columns import Columns, column_name, episode_columns, plain, require_apart
from tdhook_rl.replay.joined import Found

VERSION = "v3.0"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_FIRST = _FILE.format(chunk_index=0, file_index=0)


@checked
def to_parquet(
    results: Found,
    path: str | Path,
    buffer: Rows | None = None,
    keys: Sequence[NestedKey] | None = None,
    *,
    fps: float = 1.0,
    task: str = "",
    chunk: int = 16384,
) -> Path:
    """Write results as Parquet, a row group for each chunk of rows; with a buffer, beside its rows and by episode.

    A path that ends in ``.parquet`` is one file. Any other is the folder of a data set as LeRobot (v3.0) and TorchRL's
    ``LeRobotExperienceReplay`` read: ``data``, and ``meta`` with ``info.json``, ``stats.json``, episodes and tasks. In
    it, rows lie episode by episode, a column for each key: ``("attr", "observation")`` is ``attr.observation``,
    ``observation`` is ``observation.state``, entries of more dimensions are flat. ``buffer_index`` says which row of
    the buffer each is; its episodes are numbered anew, from 0, and
    ``is_init`` marks where one begins that is there from its beginning.

    Args:
        results: of an analysis, or their folder.
        path: a new file, or a new or empty folder.
        buffer: what was analysed.
        keys: of the buffer, to be columns too; all but next observations unless given.
        fps: steps per second, from which times are made.
        task: what was done, in words.
        chunk: rows that are held and written at once.

    Raises:
        ArgumentError: if pyarrow is not installed; for a folder without ``buffer``.
        ArtifactError: if the path is taken, or cannot be written.
        InputError: if the results are of another buffer, nothing says where episodes end, or two keys have a column of
            one name.
        MissingKeyError: for a key that the rows lack.

    Example:
        >>> import tempfile
        >>> found = TensorDict({"attr": {"observation": torch.ones(3, 2)}}, batch_size=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_parquet(to_parquet(found, f"{folder}/found.parquet"))["attr", "observation"].shape
        torch.Size([3, 2])
    """
    require_pyarrow()
    path = Path(path)
    single = path.suffix == ".parquet"
    if not single and buffer is None:
        raise ArgumentError(
            f"{path} would be a data set of episodes, which a buffer tells: give buffer=, or name a file, *.parquet"
        )
    if path.exists() and (single or not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} is there already: name a new one")
    columns = Columns.of(results, buffer, keys, chunk)
    beside = {} if columns.courses is None else episode_columns(columns.courses, fps)
    fresh = not path.exists()
    data = path if single else path / "data" / _FIRST
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        half = data.with_name(f"{data.name}.new")
        features, stats = _write(half, columns, beside, books=not single)
        half.replace(data)
        if not single:
            _write_books(path, columns, features, stats, fps, task)
    except BaseException as error:
        if not single and fresh:
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            data.with_name(f"{data.name}.new").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    return path


@checked
def load_parquet(path: str | Path, keys: Sequence[NestedKey] | None = None) -> TensorDict:
    """What :func:`to_parquet` has written, or another Parquet file of numbers, as a TensorDict of its rows.

    Args:
        path: a file, or the folder of a data set.
        keys: what is wanted; all columns unless given.

    Returns:
        ``(rows,)``; a file of others has a key for each column, nested at its dots. An ``episode_index`` is also
        ``("collector", "traj_ids")``, by which trajectories are told.

    Raises:
        ArgumentError: if pyarrow is not installed.
        ArtifactError: if it is none, or holds a column that is no numbers of one shape.
        MissingKeyError: for a key of which the file has no column.
    """
    parts: list[TensorDict] = []
    for file in parquet_files(Path(path)):
        whole = opened(file)
        known = columns_of(file, whole.schema_arrow)
        names = [*known] if keys is None else [_column_of(key, known, file) for key in keys]
        with reading(file):
            parts.append(row_tensors(whole.read(columns=names), {name: known[name] for name in names}))
    return torch.cat(parts)


# ---------------------------------------------------------------------- inner


def _column_of(key: NestedKey, known: dict[str, Column], file: Path) -> str:
    parts = key_parts(key)
    name = next((name for name, one in known.items() if tuple(one) == parts), None)
    if name is None:
        name = column_name(parts) if column_name(parts) in known else None
    if name is None:
        raise MissingKeyError(f"{file} has no column of {key!r}; {nearest('.'.join(parts), known)}")
    return name


def _write(
    path: Path, columns: Columns, beside: dict[str, np.ndarray], books: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the rows; returns what each column is, and its extremes, mean and spread.

    Args:
        path: of the file.
        columns: what is written.
        beside: where each row is.
        books: whether a data set's books go by these; otherwise what the rows say of themselves goes before.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, features, spread = None, {}, {}
    told: dict[str, Any] = {}
    owners: dict[str, Sequence[str]] = {}
    kept = {"timestamp"} if books else set(beside)  # where the rows have their own
    try:
        for start, chunk in columns.chunks():
            for key in chunk:
                require_apart(owners, column_name(key), key)
            arrays = {column_name(key): plain(value) for key, value in chunk.items()}
            told = told or {
                column_name(key): {"key": list(key), "shape": list(value.shape[1:])} for key, value in chunk.items()
            }
            rows = len(next(iter(arrays.values())))
            arrays |= {
                name: value[start : start + rows] for name, value in beside.items() if name not in kept & arrays.keys()
            }
            table = pa.table({name: _arrow(value) for name, value in arrays.items()})
            table = table.replace_schema_metadata({KEYS: json.dumps(told).encode()})
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, write_page_checksum=True)
                features = {name: _feature(value) for name, value in arrays.items()}
                spread = {name: _Spread() for name in arrays}
            writer.write_table(table, row_group_size=max(1, rows))
            for name, value in arrays.items():
                spread[name].add(value)
    finally:
        if writer is not None:
            writer.close()
    return features, {name: one.found() for name, one in spread.items()}


def _arrow(value: np.ndarray) -> Any:
    import pyarrow as pa

    if value.ndim == 1:
        return pa.array(value)
    return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])


def _feature(value: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(value.dtype), "shape": [1 if value.ndim == 1 else value.shape[1]], "names": None}


class _Spread:
    """Extremes, mean and spread of a column, from one chunk after the other; rows with NaN are left out."""

    def __init__(self) -> None:
        self.low = self.high = self.mean = self.squares = None
        self.count = 0

    def add(self, value: np.ndarray) -> None:
        rows = value.reshape(len(value), -1).astype(np.float64)
        rows = rows[np.isfinite(rows).all(1)]
        if not len(rows):
            return
        mean, count = rows.mean(0), self.count + len(rows)
        low, high, squares = rows.min(0), rows.max(0), np.square(rows - mean).sum(0)
        if self.mean is None:
            self.low, self.high, self.mean, self.squares = low, high, mean, squares
        else:
            apart = mean - self.mean
            self.squares = self.squares + squares + np.square(apart) * self.count * len(rows) / count
            self.mean = self.mean + apart * len(rows) / count
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.count = count

    def found(self) -> dict[str, Any]:
        if self.mean is None or self.low is None or self.high is None or self.squares is None:
            return {name: [0.0] for name in ("min", "max", "mean", "std")} | {"count": [0]}
        std = np.sqrt(self.squares / self.count)
        named = {"min": self.low, "max": self.high, "mean": self.mean, "std": std}
        return {name: value.tolist() for name, value in named.items()} | {"count": [self.count]}


def _write_books(
    path: Path, columns: Columns, features: dict[str, Any], stats: dict[str, Any], fps: float, task: str
) -> None:
    """What LeRobot reads beside the rows: ``meta/info.json`` comes last, and makes it a data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert columns.courses is not None
    _, lengths = columns.courses.stretch.unique_consecutive(return_counts=True)
    stops = lengths.cumsum(0)
    zeros = np.zeros(len(lengths), dtype=np.int64)
    episodes = {
        "episode_index": np.arange(len(lengths)), "tasks": [[task]] * len(lengths), "length": lengths.numpy(),
        "data/chunk_index": zeros, "data/file_index": zeros,
        "dataset_from_index": (stops - lengths).numpy(), "dataset_to_index": stops.numpy(),
        "meta/episodes/chunk_index": zeros, "meta/episodes/file_index": zeros,
        "ended": columns.courses.ended.numpy(), "begun": columns.courses.begun.numpy(),
    }  # fmt: skip
    listed = path / "meta" / "episodes" / _FIRST
    listed.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(episodes), listed)
    # As pandas writes a frame whose index are the tasks.
    kind = {"name": "__index_level_0__", "field_name": "__index_level_0__", "pandas_type": "unicode"}
    kinds = [{"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}]
    frame = {"index_columns": ["__index_level_0__"], "columns": [*kinds, {**kind, "numpy_type": "object"}]}
    tasks = pa.table({"task_index": pa.array([0]), "__index_level_0__": pa.array([task])})
    tasks = tasks.replace_schema_metadata({b"pandas": json.dumps({**frame, "column_indexes": []}).encode()})
    pq.write_table(tasks, path / "meta" / "tasks.parquet")
    write_text(path / "meta" / "stats.json", json.dumps(stats, indent=1) + "\n")
    info = {
        "codebase_version": VERSION, "robot_type": None, "fps": int(fps) if fps == int(fps) else fps,
        "total_episodes": len(lengths), "total_frames": columns.count, "total_tasks": 1, "chunks_size": 1000,
        "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "splits": {"train": f"0:{len(lengths)}"},
        "data_path": f"data/{_FILE}", "video_path": None, "features": features,
    }  # fmt: skip
    write_text(path / "meta" / "info.json", json.dumps(info, indent=1) + "\n")
