"""Progress, tables and options as all commands show them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["print_table", "progress_bar", "seed", "terminal"]


def seed(text: str) -> int:
    """A seed that torch, NumPy and environments take."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a seed is an integer from 0 to {2**32 - 1}, got {text!r}")
    return number


def terminal(width: int | None = None) -> Any:
    """What prints, names as they are: rich would take ``[up]`` for a style, and ``:door:`` for a picture."""
    from rich.console import Console

    return Console(markup=False, emoji=False, width=width)


def progress_bar(console: Any, unit: str = "frames", *, left: bool = False) -> Any:
    """A bar, with the time that is left or that has gone by; how far it is stands there where the end is known."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Count(TextColumn):
        def render(self, task: Any) -> Text:
            return Text() if task.total is None else super().render(task)

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        Count(f"{{task.completed}}/{{task.total}} {unit}"), TimeRemainingColumn() if left else TimeElapsedColumn(),
        console=console,
    )  # fmt: skip


def print_table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of which nothing is cut: in a file or a pipe as wide as it has to be, in a terminal that is too narrow a
    block of lines for each row."""
    from rich.measure import Measurement
    from rich.table import Table

    def table(heads: Sequence[str], lines: Sequence[Sequence[str]], **options: Any) -> Any:
        found = Table(**options)
        for column in heads:
            found.add_column(column, overflow="fold")
        for line in lines:
            found.add_row(*line)
        return found

    whole = table(columns, rows, title=title)
    needs = Measurement.get(console, console.options.update(width=100_000), whole)
    if not console.is_terminal:
        terminal(max(console.width, needs.maximum)).print(whole)
    elif needs.minimum <= console.width:
        console.print(whole)
    else:
        console.print(title, style="italic")
        for row in rows:
            console.rule(characters="─", style="dim")
            lines = [one for one in zip(columns, row, strict=True) if one[1]]
            console.print(table(("", ""), lines, show_header=False, box=None))
