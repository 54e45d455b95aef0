"""Where a part stands in its page: the level of its heading, ids that are its own, and the command that makes it."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from tdhook_rl.report.page.saved import file_name


@dataclass
class Place:
    """What is shared by the parts of a page while it is written.

    Attributes:
        command: what makes the page again, shown beside each figure.
        level: of headings.
        contents: the headings of level 2 with their ids, in order.
    """

    command: str = ""
    level: int = 2
    contents: list[tuple[str, str]] = field(default_factory=list)
    _ids: dict[str, int] = field(default_factory=dict)

    def id(self, text: str) -> str:
        """An id that nothing else in the page has."""
        name = one = file_name(text)
        while one in self._ids:
            self._ids[name] += 1
            one = f"{name}-{self._ids[name]}"
        self._ids[one] = 1
        return one

    def heading(self, text: str) -> str:
        """A heading that can be linked to; nothing without a text."""
        if not text:
            return ""
        one = self.id(text)
        if self.level == 2:
            self.contents.append((one, text))
        return f'<h{self.level} id="{one}">{html.escape(text)}</h{self.level}>\n'

    def inner(self) -> Place:
        """The place of parts below the heading: what they claim and list is shared."""
        return Place(self.command, min(self.level + 1, 6), self.contents, self._ids)
