"""The page of errors, docs/errors.md: ``python -m tests.error_page`` writes a section for each class.

A section is what the class says of itself, its remedy included. The messages themselves are read from the source when
the site is built (``messages``), so that the page can be searched for what somebody has before them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tdhook_rl import errors

#: Names in a message that say nothing of what is filled in.
_CALLS = {"join", "repr", "str", "map", "sorted", "type", "len", "tuple", "list", "name", "set", "int", "min", "max"}
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
START, END = "<!-- written by python -m tests.error_page -->", "<!-- up to here -->"


def classes() -> list[type[Exception]]:
    """Every error of the library, the base first."""
    found = [getattr(errors, name) for name in errors.__all__]
    return sorted((one for one in found if isinstance(one, type)), key=lambda one: (len(one.__mro__), one.__name__))


def section(error: type[Exception]) -> str:
    """What the page says of one class."""
    said = (inspect.getdoc(error) or "").replace("``", "`")
    what, _, remedy = said.partition("\n\nWhat to do: ")
    caught = ", ".join(
        f"`{base.__name__}`" for base in error.__mro__[1:] if base not in (object, BaseException, Exception)
    )
    lines = [f"## `{error.__name__}`", "", " ".join(what.split())]
    lines += ["", f"**What to do:** {' '.join(remedy.split())}"]
    return "\n".join([*lines, *(["", f"Also caught as {caught}."] if caught else [])])


def written() -> str:
    """The part of the page between the marks."""
    return "\n\n".join([START, *map(section, classes()), END])


def messages() -> dict[str, dict[str, list[str]]]:
    """By error, and ``"warnings"``, and the room that raises it: its messages, what is filled in within braces."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = {one.__name__ for one in classes()}
    for room, tree in _modules():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            kind = called if called in names else "warnings" if called == "warn" else None
            text = " ".join(_text(node.args[0]).split()) if kind else ""
            if kind and re.search(r"[a-z]{3,}", re.sub(r"\{.*?\}", "", text)):
                found[kind][room].append(text)
    return {kind: {room: sorted(set(texts)) for room, texts in sorted(rooms.items())} for kind, rooms in found.items()}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for folder, package in ((ROOT / "tdhook_rl", "tdhook_rl"), (ROOT / "envs", "tdhook_rl.envs")):
        for file in sorted(folder.rglob("*.py")):
            place = file.relative_to(folder)
            if "envs" in place.parts:  # linked into a working copy
                continue
            room = package if folder.name == "envs" else f"{package}.{Path(place.parts[0]).stem}"
            yield room, ast.parse(file.read_text())


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    names = [getattr(one, "attr", getattr(one, "id", "")).strip("_") for one in ast.walk(value)]
    return "{" + next((name for name in names if name and name not in _CALLS), "...") + "}"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(START)] + written() + text[text.index(END) + len(END) :])
    print(PAGE)
