"""Results as what can be logged: tables of their rows, pictures of figures, files of what is kept."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.artifacts import save_artifact
from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.media import DataTable, Image
from tdhook_rl.statistics import Interval

__all__ = ["files_of", "loggable", "loggable_by_name"]


def loggable_by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a sink takes, of results by name; an interval is three numbers, as in tables.

    Example:
        >>> from tdhook_rl.statistics import grouped_mean
        >>> list(loggable_by_name({"return": grouped_mean([1.0, 2.0, 4.0]), "loss": 0.5}))
        ['return', 'return_low', 'return_high', 'loss']
    """
    return {name: loggable(value) for name, value in _flat(values).items()}


def loggable(value: Any) -> Any:
    """What a sink takes, of a result; anything else as it is.

    Whatever has ``records()`` (a table of probes, a sweep) or ``frame()``, a DataFrame, and a list of mappings or
    dataclasses become tables; a matplotlib figure, and a drawing of one, become pictures.

    Example:
        >>> loggable([{"alpha": 0.0, "rate": 0.1}, {"alpha": 1.0, "rate": 0.9}]).rows
        [[0.0, 0.1], [1.0, 0.9]]
    """
    figure = value.figure if isinstance(value, Drawing) else value
    if callable(getattr(figure, "savefig", None)):
        return _picture(figure)
    for name in ("records", "frame"):
        make = getattr(value, name, None)
        if callable(make):
            return loggable(make())
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return DataTable(list(map(str, value.columns)), value.to_numpy().tolist())
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(map(_is_row, value)):
        return _table([row if isinstance(row, Mapping) else _fields(row) for row in value])
    return value


def files_of(name: str, thing: Any, place: Path, facts: Mapping[str, Any]) -> tuple[str, list[Path]]:
    """What a thing is, and its files: its own, or written into a folder by its ``save``, or with the tensors it holds.

    Raises:
        InputError: for what is no file, cannot be saved and holds no tensors.
    """
    if isinstance(thing, str | Path):
        return "file", [Path(thing)]
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    kind = type(thing).__name__
    if callable(getattr(thing, "save", None)) and not isinstance(thing, TensorDictBase):
        saved = Path(thing.save(place / safe))
    else:
        saved = save_artifact(place / safe, kind, _tensors(name, thing), facts)
    return kind, [one for one in (saved, saved.with_suffix(".json")) if one.is_file()]


def _tensors(name: str, thing: Any) -> dict[str, Tensor]:
    """The tensors of a thing, by name."""
    if isinstance(thing, TensorDictBase):
        held: Mapping[Any, Any] = thing.flatten_keys(".")
    elif isinstance(thing, nn.Module):
        held = thing.state_dict()
    else:
        held = thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
    found = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    if not found:
        raise InputError(
            f"{name!r} is a {type(thing).__name__}, which cannot be kept: give something with save(path), such as a "
            "probe or a vector, the path of a file, or tensors by name"
        )
    return found


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _fields(row: Any) -> dict[str, Any]:
    return {one.name: getattr(row, one.name) for one in dataclasses.fields(row)}


def _table(rows: Sequence[Mapping[str, Any]]) -> DataTable:
    """Columns in the order in which rows name them; an interval is three."""
    flat = [*map(_flat, rows)]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return DataTable(columns, [[row.get(name) for name in columns] for row in flat])


def _flat(values: Mapping[Any, Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, one in values.items():
        if isinstance(one, Interval):
            found |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
        else:
            found[name] = one
    return found


def _picture(figure: Any) -> Image:
    import numpy as np
    from PIL import Image as Pillow

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    with Pillow.open(file) as opened:
        return Image(np.asarray(opened.convert("RGB")))
