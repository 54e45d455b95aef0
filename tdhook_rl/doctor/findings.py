"""What a check found, one line for each thing looked at, and the report that shows them as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tdhook_rl.errors import CheckError

Level = Literal["ok", "warning", "error"]

#: Columns of the plain table.
WIDTH = 120
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at, such as ``"tie"`` or ``"devices"``.
        level: ``"ok"``; ``"warning"`` for what may be meant; ``"error"`` for what fails or is wrong in silence.
        seen: what was found.
        remedy: what to do, empty where there is nothing to do.
    """

    check: str
    level: Level
    seen: str
    remedy: str = ""

    @classmethod
    def ok(cls, check: str, seen: str) -> Finding:
        return cls(check, "ok", seen)

    @classmethod
    def warning(cls, check: str, seen: str, remedy: str = "") -> Finding:
        return cls(check, "warning", seen, remedy)

    @classmethod
    def error(cls, check: str, seen: str, remedy: str = "") -> Finding:
        return cls(check, "error", seen, remedy)


@dataclass(frozen=True)
class Report:
    """The findings of a check; ``str()`` is a plain table, and ``rich`` prints a coloured one.

    Example:
        >>> report = Report((Finding("tie", "ok", "4 tensors are shared"),))
        >>> print(report)
        ok    tie  4 tensors are shared
        1 ok, 0 warnings, 0 errors
        >>> report.raise_if_failed()
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not self.of_level("error")

    def of_level(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def raise_if_failed(self) -> None:
        """Raise if there are errors.

        Raises:
            CheckError: with each error and its remedy.
        """
        errors = self.of_level("error")
        if errors:
            shown = "\n".join(
                f"  {one.check}: {one.seen}" + (f"; {one.remedy}" if one.remedy else "") for one in errors
            )
            raise CheckError(f"a dry run of the policy found {_count(len(errors), 'error')}:\n{shown}")

    def __str__(self) -> str:
        return "\n".join([*self._lines(), self.summary()])

    def summary(self) -> str:
        """How many findings there are of each level."""
        counts = {level: len(self.of_level(level)) for level in ("ok", "warning", "error")}  # type: ignore[arg-type]
        return f"{counts['ok']} ok, {_count(counts['warning'], 'warning')}, {_count(counts['error'], 'error')}"

    def _lines(self) -> Iterator[str]:
        names = max((len(finding.check) for finding in self.findings), default=0)
        levels = max((len(finding.level) for finding in self.findings), default=0)
        levels = max(levels, len("error"))
        for finding in self.findings:
            head = f"{finding.level:<{levels}} {finding.check:<{names}}  "
            room = WIDTH - len(head)
            body = textwrap.wrap(finding.seen, room) + [
                line
                for index, part in enumerate(textwrap.wrap(finding.remedy, room - 3))
                for line in [f"{'-> ' if index == 0 else '   '}{part}"]
            ]
            for index, line in enumerate(body):
                yield f"{head if index == 0 else ' ' * len(head)}{line}".rstrip()

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary())
        for column in ("level", "check", "seen", "remedy"):
            table.add_column(column)
        for finding in self.findings:
            # Text, because module paths such as [0] would be read as markup.
            cells = map(Text, (finding.check, finding.seen, finding.remedy))
            table.add_row(Text(finding.level, style=_STYLES[finding.level]), *cells)
        return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
