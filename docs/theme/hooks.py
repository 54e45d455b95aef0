"""What happens to a page while the site is built.

Figures stand in it, so that their ink follows the light; and under each error stand the messages that it comes with.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

#: A figure of the library, as a page names it.
FIGURE = re.compile(r'<p><img alt="([^"]*)" src="((?:\.\./)*(?:how_to/)?figures/[\w.]+\.svg)"[^>]*/?></p>')
ROOT = Path(__file__).parents[1]


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Put figures into the page."""
    folder = (ROOT / page.file.src_uri).parent

    def drawn(found: re.Match[str]) -> str:
        text = (folder / found[2]).read_text()
        return f'<div class="drawing">{re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)}</div>'

    return FIGURE.sub(drawn, html)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put messages below errors."""
    if page.file.src_uri != "errors.md":
        return markdown
    sys.path.insert(0, str(ROOT.parent))
    from tests.error_page import messages

    found = messages()
    for kind, rooms in found.items():
        listed = "".join(
            f"<li><code>{room}</code><ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul></li>"
            for room, texts in rooms.items()
        )
        count = sum(map(len, rooms.values()))
        words = f"{count} messages" if count > 1 else "the message"
        shown = f'<details class="messages"><summary>{words}</summary><ul>{listed}</ul></details>'
        markdown = re.sub(
            rf"(^## (?:`{kind}`|{kind.title()})\n.*?)(?=\n## |\n<!-- up to here|\Z)",
            lambda one, shown=shown: f"{one[1]}\n\n{shown}\n",
            markdown,
            flags=re.MULTILINE | re.DOTALL,
        )
    return markdown
