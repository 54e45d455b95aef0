"""Rows of Parquet files by their number, whoever wrote them: a file, a folder of files, a data set of LeRobot's."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.errors import ArgumentError, ArtifactError, listed, warn
from tdhook_rl.files.durable import read_json
from tdhook_rl.reading.order import Written

#: What a file says of its columns, below this name in its metadata.
KEYS = b"tdhook_rl.keys"
#: Rows that are decoded at once, and bytes of a file that are read at once.
_PIECE, _BUFFER = 8192, 1 << 20


class Column(tuple):
    """The parts of a column's key, with the shape of a row where the file says it."""

    shape: list[int] | None = None


class ParquetRows:
    """A row for each row of the files, as a source: a key for each column of numbers.

    What is held is some thousand rows, whatever the size of a row group; but a row group is decoded from its beginning,
    so that several readers of one file are fastest where its row groups are no larger than their chunks.

    Args:
        path: a file, a folder of files, which are read in the order of their names and the numbers in these, or the
            folder of a data set.

    Raises:
        ArgumentError: if pyarrow is not installed.
        ArtifactError: if there are no rows, a file cannot be read, has other columns than the first, or is missing.
    """

    rows, known, turn = 1, True, 0

    def __init__(self, path: Path) -> None:
        self.transforms: list[nn.Module] = []
        self._groups: list[tuple[Path, int]] = []
        self._columns: dict[str, Column] = {}
        sizes: list[int] = []
        types: dict[str, Any] = {}
        for file in parquet_files(path):
            found = opened(file)
            described = {field.name: field.type for field in found.schema_arrow}
            types = types or described
            if described != types:
                odd = sorted({name for name, _ in described.items() ^ types.items()})
                raise ArtifactError(
                    f"{file} has another column {odd[0]!r} than the files before it, which is read with them"
                )
            self._columns = self._columns or columns_of(file, found.schema_arrow)
            self._groups += [(file, group) for group in range(found.num_row_groups)]
            sizes += [found.metadata.row_group(group).num_rows for group in range(found.num_row_groups)]
        self._stops = torch.tensor(sizes, dtype=torch.long).cumsum(0)
        self.entries = int(sum(sizes))
        if not self.entries:
            raise ArtifactError(f"{path} has no rows")
        _require_all(path, self.entries)
        other = [name for name, kind in types.items() if not _is_number(kind)]
        if other:
            warn(
                f"of {path} the columns {listed(map(repr, other), 8, 'and {} more')} hold no numbers, and are left out"
            )
        self._columns = {name: key for name, key in self._columns.items() if name not in other}
        self._group, self._first = -1, 0
        self._stream: Iterator[Any] = iter(())
        self._piece: TensorDict | None = None
        self._shapes: dict[Any, torch.Size] = {}

    def raw(self, index: Tensor) -> TensorDict:
        order = index.argsort(stable=True)
        wanted, parts, at = index[order], [], 0
        while at < len(wanted):
            first, piece = self._around(int(wanted[at]))
            until = int(torch.searchsorted(wanted, first + len(piece)))
            parts.append(piece[wanted[at:until] - first])
            at = until
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found if torch.equal(wanted, index) else found[order.argsort()]

    def writes(self) -> None:
        return None

    def written(self, looking: str) -> Written:
        return Written()

    def _around(self, row: int) -> tuple[int, TensorDict]:
        """Some rows of which this is one, and the number of their first."""
        if self._piece is not None and self._first <= row < self._first + len(self._piece):
            return self._first, self._piece
        group = int(torch.searchsorted(self._stops, row, right=True))
        file, number = self._groups[group]
        if group != self._group or row < self._first:
            self._stream = opened(file).iter_batches(batch_size=_PIECE, row_groups=[number], columns=[*self._columns])
            self._group, self._first = group, int(self._stops[group - 1]) if group else 0
        else:
            self._first += 0 if self._piece is None else len(self._piece)
        self._piece = None
        with reading(file):
            for batch in self._stream:
                if row < self._first + batch.num_rows:
                    self._piece = self._tensors(file, batch)
                    return self._first, self._piece
                self._first += batch.num_rows
        raise ArtifactError(f"{file} has fewer rows than it says: it ends before row {row}")

    def _tensors(self, file: Path, batch: Any) -> TensorDict:
        found = row_tensors(batch, self._columns)
        for key, value in found.items(True, True):
            shape = self._shapes.setdefault(key, value.shape[1:])
            if value.shape[1:] != shape:
                raise ArtifactError(
                    f"the rows of {key!r} differ in length: in {file} they are of shape {tuple(value.shape[1:])} from "
                    f"row {self._first} on, and were {tuple(shape)} before"
                )
        return found


def holds_parquet(path: Path) -> bool:
    """Whether a path is that of a Parquet file, or of a folder of some."""
    return path.suffix == ".parquet" or (path.is_dir() and bool(_inside(path)))


def parquet_files(path: Path) -> list[Path]:
    """The file, or those of a folder in their order.

    Raises:
        ArgumentError: if pyarrow is not installed.
        ArtifactError: if there is none.
    """
    require_pyarrow()
    if not path.is_dir():
        return [path]
    files = _inside(path)
    if not files:
        raise ArtifactError(f"{path} holds no data set: there is no Parquet file in {path / 'data'}")
    return files


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What cannot be read inside is an :class:`ArtifactError` that names the file."""
    from pyarrow import ArrowException

    try:
        yield
    except ArtifactError:
        raise
    except (ArrowException, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"cannot read {file}: {error}") from error


def opened(file: Path) -> Any:
    """The file, of which nothing but its end has been read."""
    import pyarrow.parquet as pq

    with reading(file):
        return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def columns_of(file: Path, schema: Any) -> dict[str, Column]:
    """The key of each column: what the file says, or its name, nested at its dots."""
    found: dict[str, Column] = {}
    with reading(file):
        told = json.loads((schema.metadata or {}).get(KEYS, b"{}"))
        for name in schema.names:
            key = Column(told[name]["key"] if name in told else name.split("."))
            key.shape = told[name]["shape"] if name in told else None
            found[name] = key
    # Where a name is the beginning of another, that stays whole.
    for name, key in [*found.items()]:
        if any(other != key and key[: len(other)] == other for other in found.values()):
            whole = Column((name,))
            whole.shape = key.shape
            found[name] = whole
    return found


def row_tensors(table: Any, columns: dict[str, Column]) -> TensorDict:
    """These columns of a table, and the number of each row's trajectory where it has one.

    Raises:
        ArtifactError: for a column that is no numbers of one shape.
    """
    found = TensorDict({}, batch_size=[table.num_rows])
    for name, key in columns.items():
        found.set(tuple(key), _tensor(table[name], key))
    if "episode_index" in columns:
        found.set(("collector", "traj_ids"), found["episode_index"].clone())
    return found


def require_pyarrow() -> None:
    """Raise :class:`ArgumentError` if it is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise ArgumentError(
            "Parquet is read and written by pyarrow, which is not installed: pip install 'tdhook_rl[parquet]'"
        ) from None


def _inside(folder: Path) -> list[Path]:
    found = [*(folder / "data").rglob("*.parquet")] or [*folder.glob("*.parquet")]
    return sorted(found, key=lambda file: [int(one) if one.isdigit() else one for one in re.split(r"(\d+)", str(file))])


def _require_all(path: Path, rows: int) -> None:
    """Raise :class:`ArtifactError` if a data set says that it has other rows: a file is missing, or not its own."""
    info = path / "meta" / "info.json"
    if not info.is_file():
        return
    facts = read_json(info, "what a data set says of itself")
    frames = facts.get("total_frames", rows) if isinstance(facts, dict) else rows
    if frames != rows:
        raise ArtifactError(f"{info} says that there are {frames} rows, and the files of the data set have {rows}")


def _tensor(column: Any, key: Column) -> Tensor:
    import pyarrow as pa
    import pyarrow.compute as pc

    name = ".".join(key)
    rows = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not _is_number(rows.type):
        raise ArtifactError(f"the column {name!r} holds {rows.type}, which is no number")
    count = len(rows)
    shape: list[int] = []
    while _is_list(rows.type):
        _require_values(rows, name)
        lengths = pc.unique(pc.list_value_length(rows)).to_pylist()
        if len(lengths) > 1:
            few = listed(map(str, sorted(lengths)), 4, "and {} more")
            raise ArtifactError(f"the rows of the column {name!r} differ in length: there are {few}")
        shape += lengths or [0]
        rows = rows.flatten()
    _require_values(rows, name)
    found = torch.from_numpy(np.array(rows.to_numpy(zero_copy_only=False))).reshape(count, *shape)
    if key.shape is None:
        return found
    if found[:1].numel() != torch.Size(key.shape).numel() and count:
        raise ArtifactError(f"the column {name!r} has rows of {found[0].numel()} numbers, and says {key.shape}")
    return found.reshape(count, *key.shape)


def _require_values(rows: Any, name: str) -> None:
    if rows.null_count:
        raise ArtifactError(f"the column {name!r} has {rows.null_count} rows without a value")


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
