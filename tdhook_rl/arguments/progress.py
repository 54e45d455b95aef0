"""What `progress=` takes: a bar with the time that is left on a terminal, a function of the caller's, or nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

from tdhook_rl.errors import ArgumentError

#: Called with the entries that are done, and with all.
Progress = Callable[[int, int], None]


@contextlib.contextmanager
def shown(progress: Progress | bool | None, what: str) -> Iterator[Progress]:
    """What to call with the entries that are done, and all.

    Args:
        progress: a function; ``True`` for a bar, ``False`` for nothing, ``None`` for a bar where somebody looks.
        what: is done, in a word or two.

    Raises:
        ArgumentError: if a bar is asked for and rich, which draws it, is not installed.
    """
    if callable(progress):
        yield progress
        return
    drawn = importlib.util.find_spec("rich") is not None
    if progress and not drawn:
        raise ArgumentError(
            "progress=True draws a bar with rich, which is not installed: pip install 'tdhook_rl[demo]'"
        )
    if not (progress or (progress is None and drawn and sys.stderr is not None and sys.stderr.isatty())):
        yield lambda done, entries: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # What is printed goes to standard output as it is: that may be a file.
    with Bar(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        tasks: list[int] = []

        def show(done: int, entries: int) -> None:
            if not tasks:  # what was there before counts for nothing in the speed
                tasks.append(bar.add_task(what, total=entries, completed=done))
            bar.update(tasks[0], completed=done)

        yield show
