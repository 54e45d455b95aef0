"""The parts of docs/reliability.md that commands write."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def put(name: str, text: str) -> None:
    """Replace what stands between the marks of a part."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise LookupError(f"{PAGE} has no part {name!r}")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
