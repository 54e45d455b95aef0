"""Progress, tables and options as all commands show them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["print_table", "progress_bar", "seed"]


def seed(text: str) -> int:
    """A seed that torch, NumPy and environments take."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a seed is an integer from 0 to {2**32 - 1}, got {text!r}")
    return number


def progress_bar(console: Any, unit: str = "frames") -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def print_table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
