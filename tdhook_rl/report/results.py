"""Results as what can be logged: tables of their rows, pictures of figures."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tdhook_rl.report.media import DataTable, Image
from tdhook_rl.statistics import Interval
from tdhook_rl.sweeps.dose_response import DoseResponse

__all__ = ["loggable"]


def loggable(value: Any) -> Any:
    """What a sink takes, of a result; anything else as it is.

    A dose-response, whatever has ``records()`` (a table of probes) or ``frame()``, a DataFrame, and a list of mappings
    or dataclasses become tables; a matplotlib figure becomes a picture.

    Example:
        >>> loggable([{"alpha": 0.0, "rate": 0.1}, {"alpha": 1.0, "rate": 0.9}]).rows
        [[0.0, 0.1], [1.0, 0.9]]
    """
    if isinstance(value, DoseResponse):
        return _table(_doses(value))
    if callable(getattr(value, "savefig", None)):
        return _picture(value)
    for name in ("records", "frame"):
        make = getattr(value, name, None)
        if callable(make):
            return loggable(make())
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return DataTable(list(map(str, value.columns)), value.to_numpy().tolist())
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(map(_is_row, value)):
        return _table([row if isinstance(row, Mapping) else _fields(row) for row in value])
    return value


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _fields(row: Any) -> dict[str, Any]:
    return {one.name: getattr(row, one.name) for one in dataclasses.fields(row)}


def _table(rows: Sequence[Mapping[str, Any]]) -> DataTable:
    """Columns in the order in which rows name them; an interval is three."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name, one in row.items():
            if isinstance(one, Interval):
                cells |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
            else:
                cells[str(name)] = one
        flat.append(cells)
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return DataTable(columns, [[row.get(name) for name in columns] for row in flat])


def _doses(result: DoseResponse) -> list[dict[str, Any]]:
    """A row for each outcome and strength: under the vector, and under random ones of equal norm."""
    found = []
    for outcome, rates in result.rates.items():
        for place, (alpha, one) in enumerate(zip(result.alphas, result.intervals(outcome), strict=True)):
            row: dict[str, Any] = {"outcome": outcome, "alpha": alpha, "rate": one}
            if len(rates) > 1:
                random = rates[1:, place]
                row |= {"random": float(random.mean()), "random_low": float(random.min()),
                        "random_high": float(random.max())}  # fmt: skip
            found.append(row | {"controls": len(rates) - 1, "episodes": result.episodes})
    return found


def _picture(figure: Any) -> Image:
    import numpy as np
    from PIL import Image as Pillow

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    with Pillow.open(file) as opened:
        return Image(np.asarray(opened.convert("RGB")))
