"""Docstrings as the site shows them: references become links where there is a page, and code where there is none."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`(~?)(?:([^`<]+?)\s*<)?([\w.]+)>?`")


class References(griffe.Extension):
    """Turns Sphinx's roles into Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = in_markdown(obj.docstring.value)


def in_markdown(text: str) -> str:
    """A docstring without roles; what is on a page of the reference is a link to it.

    Example:
        >>> in_markdown("as of :class:`~tdhook_rl.latent.SteeringVectors`, or :meth:`update`")
        'as of [`SteeringVectors`][tdhook_rl.latent.SteeringVectors], or `update`'
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # a section with code, as Google's style has it
    return ROLE.sub(_link, text.replace("``", "`"))


def _link(found: re.Match[str]) -> str:
    short, words, target = found.groups()
    shown = words or (target.rpartition(".")[2] if short else target)
    return f"[`{shown}`][{target}]" if target in on_pages() else f"`{shown}`"


def on_pages() -> set[str]:
    """What the pages of the reference show."""
    global _PAGES
    if _PAGES is None:
        from pathlib import Path

        pages = (Path(__file__).parents[1] / "reference").glob("*.md")
        _PAGES = {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)}
    return _PAGES


_PAGES: set[str] | None = None
