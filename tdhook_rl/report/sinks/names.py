"""Names as backends take them: two levels, ``interp/probe.fc2.accuracy``, and no two the same."""

from __future__ import annotations

import re
import weakref
import zlib
from typing import Any

from tdhook_rl.errors import warn

__all__ = ["PREFIX", "Tags", "claim", "release", "told_apart"]

#: W&B has one step axis for each first level, so one is used for all.
PREFIX = "interp"
#: Some backends make a file of each name, and file systems end at 255 bytes.
LONGEST = 180


class Tags:
    """The tag of each name: below the prefix, without further slashes.

    Args:
        prefix: the first level.
        other: what the backend would replace by itself, so that two names could become one.

    Example:
        >>> tags = Tags("interp", other=r"[^-\\w.]")
        >>> tags["probe/the door"], tags["probe.the_door"], tags["probe/the door"]
        ('interp/probe.the_door', 'interp/probe.the_door~176799e2', 'interp/probe.the_door')
    """

    def __init__(self, prefix: str = PREFIX, other: str = r"[\x00-\x1f]") -> None:
        self.prefix = prefix
        self._other = re.compile(other)
        self._tags: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> str:
        tag = self._tags.get(name)
        if tag is None:
            tag = self._other.sub("_", re.sub(r"[/\\]", ".", name))
            cut = tag.encode()[:LONGEST].decode(errors="ignore")
            if cut != tag or cut in self._taken or cut == "step":
                cut = f"{cut}~{zlib.crc32(name.encode()):08x}"
            self._taken.add(cut)
            tag = self._tags[name] = f"{self.prefix}/{cut}"
        return tag


#: Words, and what stands between them, that a short name tells apart: no sign before a number, no other alphabets.
_PLAIN = re.compile(r"[\w.]+(?:(?:[/ ]|, |: |-(?!\d))[\w.]+)*", re.ASCII)


def told_apart(short: str, text: str, *, most: int = LONGEST) -> str:
    """A short name made of a text, with a number behind it where it may be that of another text too.

    Args:
        short: the name.
        text: of which it is made.
        most: letters that a name has, before that number.

    Example:
        >>> told_apart("the-door", "the door"), told_apart("alpha-1", "alpha=-1"), told_apart("alpha-1", "alpha=1")
        ('the-door', 'alpha-1-49c8d4e0', 'alpha-1-baf881be')
    """
    if _PLAIN.fullmatch(text) and len(short) <= most:
        return short
    return f"{short[:most]}-{zlib.crc32(text.encode(errors='replace')):08x}"


#: Who logs into what, in the order in which they came.
_CLAIMED: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def claim(target: Any, prefix: str) -> str:
    """A prefix that nothing else of ours uses in a run or logger, in words where it is not the one asked for."""
    try:
        taken = _CLAIMED.setdefault(target, [])
    except TypeError:  # what cannot be referred to weakly is not told apart
        return prefix
    free, number = prefix, 1
    while free in taken:
        number += 1
        free = f"{prefix}{number}"
    if free != prefix:
        warn(f"something logs into this {type(target).__name__} as {prefix}/... already: this one does as {free}/...")
    taken.append(free)
    return free


def release(target: Any, prefix: str) -> None:
    """Give a prefix back."""
    try:
        taken = _CLAIMED.get(target, [])
    except TypeError:
        return
    if prefix in taken:
        taken.remove(prefix)
