"""Results as columns, a row for each row of the buffer: what files and frames of other libraries take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import ArgumentError, InputError, MissingKeyError, nearest
from tdhook_rl.reading.order import Courses
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.joined import Found, Joined, results_of
from tdhook_rl.replay.results import INDEX

#: Of ``next`` what says how a step went; the observation is that of the row after.
_OUTCOMES = ("reward", "done", "terminated", "truncated")


@dataclass(frozen=True)
class Columns:
    """Rows in order, episode by episode where a buffer says which these are.

    Attributes:
        count: how many rows there are.
        courses: the episodes; none without a buffer.
        chunks: gives the rows in chunks: their first number here, and keys with ``(rows, ...)`` tensors.
    """

    count: int
    courses: Courses | None
    chunks: Any

    @staticmethod
    def of(results: Found, buffer: Rows | None, keys: Sequence[NestedKey] | None, chunk: int) -> Columns:
        """The results, and these keys of the rows they are of; of a part of the buffer, those rows.

        Raises:
            InputError: if the results are of another buffer, or nothing says where episodes end.
            MissingKeyError: for a key that the rows lack.
        """
        found = results_of(results)
        if buffer is None:
            if keys:
                raise InputError(f"keys= names {keys[0]!r} of a buffer, and none is given: buffer=")
            return _bare(found, chunk)
        joined = Joined(buffer, results)
        courses = joined.courses("an export")
        index = found.get(INDEX, None)
        entries = torch.arange(len(found)) if index is None else index.reshape(len(index), -1)[:, 0]
        if len(entries) < joined.reader.size:  # of the episodes that part which was analysed
            analysed = torch.zeros(joined.reader.size, dtype=torch.bool)
            analysed[entries] = True
            kept = analysed[courses.rows // joined.reader.rows]
            there, stretch = courses.stretch[kept].unique(return_inverse=True)
            whole = courses.stretch.bincount() == courses.stretch[kept].bincount(minlength=len(courses.begun))
            ended, begun = (one[there] & whole[there] for one in (courses.ended, courses.begun))
            courses = Courses(courses.rows[kept], stretch, ended, begun)
        own = [key_parts(key) for key in found.keys(True, True) if key != INDEX]
        wanted = _wanted(joined.rows(courses.rows[:1]), keys, own)

        def chunks() -> Iterator[tuple[int, dict[tuple[str, ...], Tensor]]]:
            for start in range(0, len(courses.rows), chunk):
                rows = joined.rows(courses.rows[start : start + chunk])
                yield start, {parts: rows.get(parts).detach().cpu() for parts in (*wanted, *own)}

        return Columns(len(courses.rows), courses, chunks)


def _bare(found: TensorDictBase, chunk: int) -> Columns:
    entries = max(1, chunk // max(1, found.batch_size[1:].numel()))
    each = found.batch_size[1:].numel()

    def chunks() -> Iterator[tuple[int, dict[tuple[str, ...], Tensor]]]:
        for start in range(0, len(found), entries):
            part = found[start : start + entries]
            flat = part if part.ndim == 1 else part.flatten(0, -1)
            yield start * each, {key_parts(key): value.detach().cpu() for key, value in flat.items(True, True)}

    return Columns(found.batch_size.numel(), None, chunks)


def _wanted(
    row: TensorDictBase, keys: Sequence[NestedKey] | None, own: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Of the buffer's keys those that are asked for: all but what results, books and the next row hold."""
    known = {key_parts(key): value for key, value in row.items(True, True) if isinstance(value, Tensor)}
    if keys is None:
        skipped = {INDEX, "collector", "computed"} | {parts[0] for parts in own}
        outcomes = {("next", one) for one in _OUTCOMES}
        return [parts for parts in known if parts in outcomes or parts[0] not in {"next", *skipped}]
    for key in keys:
        if key_parts(key) not in known:
            raise MissingKeyError(f"keys= names {key!r}, which the rows lack; {nearest(str(key), map(str, known))}")
    return [parts for key in keys if (parts := key_parts(key)) not in own]


def plain(value: Tensor) -> np.ndarray:
    """``(rows, numbers)``, or ``(rows,)`` of one each, as NumPy has them.

    Raises:
        InputError: for complex numbers, which no such file takes.
    """
    if value.is_complex():
        raise InputError(f"a column of {value.dtype} has no place in a table: take its parts, or its size")
    if value.dtype.is_floating_point and value.dtype not in (torch.float16, torch.float32, torch.float64):
        value = value.float()
    flat = value.reshape(len(value), -1)
    return (flat[:, 0] if value.ndim == 1 or flat.shape[1] == 1 else flat).contiguous().numpy()


def episode_columns(courses: Courses, fps: float) -> dict[str, np.ndarray]:
    """Where each row is: its episode, its step in it, its time in seconds, its number in the buffer; and whether an
    episode begins with it, of which some may have begun before."""
    _, lengths = courses.stretch.unique_consecutive(return_counts=True)
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    frame = torch.arange(len(courses.rows)) - start
    return {
        "episode_index": courses.stretch.numpy(),
        "frame_index": frame.numpy(),
        "timestamp": (frame.double() / fps).float().numpy(),
        "index": np.arange(len(courses.rows)),
        "task_index": np.zeros(len(courses.rows), dtype=np.int64),
        "buffer_index": courses.rows.numpy(),
        "is_init": ((frame == 0) & courses.begun[courses.stretch]).numpy(),
    }


def column_name(parts: Sequence[str]) -> str:
    """The name of a column; an observation that is one tensor is called as robots' data sets call it.

    Example:
        >>> column_name(("attr", "observation")), column_name(("observation",))
        ('attr.observation', 'observation.state')
    """
    return "observation.state" if tuple(parts) == ("observation",) else ".".join(parts)


def require_apart(names: dict[str, Sequence[str]], name: str, key: Sequence[str]) -> None:
    """Raise if another key has a column of this name.

    Args:
        names: by column the key it is of; this one is added.
        name: of the column.
        key: whose it is.

    Raises:
        InputError: that names both.
    """
    other = names.setdefault(name, key)
    if tuple(other) != tuple(key):
        raise InputError(
            f"{tuple(other)!r} and {tuple(key)!r} both have a column {name!r}: write them apart, results.select(...), "
            "or rename one"
        )


@checked
def frame(
    results: Found,
    buffer: Rows | None = None,
    keys: Sequence[NestedKey] | None = None,
    *,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Results as a pandas DataFrame, a row each; with a buffer, beside the episode and the step of each row.

    Args:
        results: of an analysis, or their folder.
        buffer: what was analysed.
        keys: of the buffer, to be columns too; all but next observations unless given.
        names: of the features of a key, by the name of its column; their numbers unless given.

    Raises:
        InputError, MissingKeyError: as of :func:`to_parquet`; if two keys have a column of one name.

    Example:
        >>> from tensordict import TensorDict
        >>> found = TensorDict({"attr": {"observation": torch.ones(3, 2)}}, batch_size=3)
        >>> frame(found, names={"attr.observation": ["left", "right"]}).columns.tolist()
        ['attr.observation.left', 'attr.observation.right']
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise ArgumentError(
            "a data frame is pandas', which is not installed: pip install 'tdhook_rl[parquet]'"
        ) from None
    columns = Columns.of(results, buffer, keys, 1 << 14)
    parts: dict[str, list[np.ndarray]] = {}
    wide: dict[str, None] = {}
    owners: dict[str, Sequence[str]] = {}
    for _, chunk in columns.chunks():
        for key, value in chunk.items():
            name, array = column_name(key), plain(value)
            if array.ndim == 1:
                require_apart(owners, name, key)
                parts.setdefault(name, []).append(array)
                continue
            wide[name] = None
            named = (names or {}).get(name, range(array.shape[1]))
            if len(named) != array.shape[1]:
                raise InputError(f"names= has {len(named)} names of {name!r}, which has {array.shape[1]} features")
            for number, one in enumerate(named):
                require_apart(owners, f"{name}.{one}", key)
                parts.setdefault(f"{name}.{one}", []).append(array[:, number])
    if unknown := [name for name in names or {} if name not in wide]:
        raise InputError(
            f"names= is by column, of which none with features is {unknown[0]!r}; {nearest(unknown[0], wide)}"
        )
    beside = {} if columns.courses is None else episode_columns(columns.courses, 1.0)
    kept = ("episode_index", "frame_index", "buffer_index")
    data = {name: beside[name] for name in kept if name in beside}
    return pandas.DataFrame(data | {name: np.concatenate(one) for name, one in parts.items()})
