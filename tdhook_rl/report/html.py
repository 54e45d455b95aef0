"""A report in one HTML file: tables and figures that open anywhere, without a server."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Figure", "Table", "write_report"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d232b; }
body { max-width: 880px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #56606c; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #e1e5ea; }
th { color: #56606c; font-weight: 600; } td.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.yes { color: #23703f; } td.no { color: #b3382c; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption { color: #56606c; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; cells that read ``yes`` or ``no`` are coloured."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG under a heading, with a sentence that says what to see in it."""

    heading: str
    path: Path
    caption: str


def write_report(path: Path, title: str, lead: str, parts: Sequence[Table | Figure]) -> Path:
    """Write the report; images are embedded.

    Args:
        path: the HTML file.
        title: its title.
        lead: one sentence below the title.
        parts: tables and figures, in order.
    """
    body = "\n".join(_table(part) if isinstance(part, Table) else _figure(part) for part in parts)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</body></html>\n'
    )
    return path


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    text = f"<p>{html.escape(table.text)}</p>" if table.text else ""
    return f"<h2>{html.escape(table.heading)}</h2>{text}\n<table><tr>{head}</tr>\n{rows}</table>"


def _cell(text: str) -> str:
    kind = f' class="{text}"' if text in ("yes", "no") else ' class="num"' if text[:1].isdigit() else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    return (
        f"<h2>{html.escape(figure.heading)}</h2>\n<figure>"
        f'<img alt="{html.escape(figure.heading)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )
