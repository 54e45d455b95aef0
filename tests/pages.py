"""The pages of docs/ as programs: their blocks of Python in order, what these print, which figures they save.

``python -m tests.pages [PAGE ...]`` runs pages (all of them unless named), and writes what is printed into the blocks
titled "prints", and the figures that a page shows into the folder ``figures`` beside it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
#: A block, and the output that the page shows below it.
BLOCK = re.compile(
    r'^```python\n(.*?)^```\n(?:\n```text title="(prints|prints, for instance)"\n(.*?)^```\n)?',
    re.MULTILINE | re.DOTALL,
)
FIGURE = re.compile(r"!\[[^\]]*\]\(figures/([\w.]+)\)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
#: In an SVG file that is opened by itself, or shown by GitHub, the ink follows the light as well.
DARK = "<style>@media (prefers-color-scheme: dark) {svg {color: #e6e9ee; --lines: #3a424d}}</style>"


@dataclass(frozen=True)
class Block:
    """One block of Python of a page."""

    code: str
    shown: str | None
    line: int
    exact: bool = True  # otherwise its numbers hang on the machine, as those of a trained agent do


def pages() -> list[Path]:
    """The pages that hold Python, but for the page on methods, which is a module of its own."""
    found = sorted(page for page in DOCS.rglob("*.md") if page.name != "write_your_own_method.md")
    return [page for page in found if BLOCK.search(page.read_text())]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text()
    return [
        Block(one[1], one[3], text.count("\n", 0, one.start()) + 1, one[2] != "prints, for instance")
        for one in BLOCK.finditer(text)
    ]


def figures(page: Path) -> list[str]:
    """The names of the figures that a page shows and makes."""
    return FIGURE.findall(page.read_text())


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Run a page as one program in the working directory; each block with what it printed."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        # Lines are counted as in the page, so that an error names the line there.
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        yield block, printed.getvalue()


def alike(shown: str, printed: str, exact: bool = True) -> bool:
    """Whether two outputs have the same words, and numbers within what another processor may make of them.

    Example:
        >>> alike("accuracy 0.91, 20 rows", "accuracy 0.90, 20 rows"), alike("accuracy 0.91", "accuracy 0.4")
        (True, False)
    """
    words, others = (re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (shown, printed))
    if words != others or not exact:
        return words == others
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= 0.06 + 0.25 * abs(float(one)) for one, other in pairs)


def write(page: Path) -> None:
    """Put outputs and figures into a page."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        printed = [output for _, output in run(page)]
        outputs = iter(printed)

        def with_output(found: re.Match[str]) -> str:
            output = next(outputs)
            if found[2] is None:
                return found[0]
            return f'```python\n{found[1]}```\n\n```text title="{found[2]}"\n{_trimmed(output)}```\n'

        page.write_text(BLOCK.sub(with_output, page.read_text()))
        for name in figures(page):
            target = page.parent / "figures" / name
            target.parent.mkdir(exist_ok=True)
            saved = Path(name).read_bytes()
            if name.endswith(".svg"):
                saved = re.sub(rb"(<svg[^>]*>)", rb"\1" + DARK.encode(), saved, count=1)
            target.write_bytes(saved)


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("WANDB_SILENT", "true")
    for one in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        started = time.perf_counter()
        write(one)
        print(f"{one.relative_to(ROOT)}: {time.perf_counter() - started:.1f} s")
