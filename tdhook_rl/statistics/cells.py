"""A table of figures: rows as numbers and words, as a frame, as JSON, as text, in a notebook."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from tdhook_rl.errors import InputError, listed
from tdhook_rl.statistics.interval import Interval


class Cell(Protocol):
    """One row of a table."""

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words."""
        ...


C = TypeVar("C", bound=Cell)


class Cells(Sequence[C], Generic[C]):
    """Rows of figures, each of which says its numbers; a subclass says which columns are shown."""

    _cells: Sequence[C]

    def __init__(self, cells: Sequence[C]) -> None:
        self._cells = list(cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[C]:
        return iter(self._cells)

    def __getitem__(self, key: Any) -> Any:
        return self._cells[key]

    def records(self) -> list[dict[str, Any]]:
        """A row of numbers and words for each cell."""
        return [cell.numbers() for cell in self._cells]

    def frame(self) -> Any:
        """A pandas DataFrame, a row for each cell.

        Raises:
            InputError: without pandas.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise InputError("a DataFrame needs pandas: pip install pandas; .records() are the same rows") from None
        return pandas.DataFrame(self.records())

    def json(self) -> str:
        """The same rows as JSON; what is not known is ``null``."""
        rows = [
            {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in row.items()}
            for row in self.records()
        ]
        return json.dumps(rows, indent=1)

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown."""
        raise NotImplementedError

    def __str__(self) -> str:
        columns, rows = self.columns()
        widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                 for row in [columns, *rows]]  # fmt: skip
        return "\n".join([*lines, *self._words_below(columns, rows)])

    def _repr_html_(self) -> str:
        from html import escape

        heads, rows = self.columns()
        head = "".join(f"<th>{escape(one)}</th>" for one in heads)
        body = "".join("<tr>" + "".join(f"<td>{escape(one)}</td>" for one in row) + "</tr>" for row in rows)
        below = "".join(f"<p>{escape(one)}</p>" for one in self._words_below(heads, rows))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"

    def _words_below(self, heads: list[str], rows: list[list[str]]) -> list[str]:
        """What the rows that are shown say in words, where no column has that."""
        words = "" if "words" in heads else words_of(*self[: len(rows)])
        return [words] if words else []


def words_of(*cells: Cell) -> str:
    """What cells and their intervals say in words, such as why there are no limits; each thing once."""
    said: list[str] = []
    for cell in cells:
        said.append(getattr(cell, "words", ""))
        said += [one.words for one in vars(cell).values() if isinstance(one, Interval)]
    return "; ".join(dict.fromkeys(part for words in said for part in words.split("; ") if part))


def only(found: Sequence[C], asked: object, names: Sequence[tuple[str, ...]]) -> C | None:
    """The cell that is asked for; none where there is none.

    Args:
        found: those that it may be.
        asked: by what it was asked for, for the message.
        names: what each of them is called in full.

    Raises:
        InputError: for several.
    """
    if len(found) > 1:
        raise InputError(
            f"the table has {len(found)} cells of {asked!r}: name one, {listed(map(repr, names), 4, 'or {} more')}"
        )
    return found[0] if found else None


def shown(one: Interval | None, digits: str = ".3f") -> str:
    """An interval as it stands in a table."""
    if one is None:
        return "-"
    if math.isnan(one.estimate):
        return "none"
    return f"{one:{digits}}" + (f" [{one.low:{digits}}, {one.high:{digits}}]" if one.known else "")
