"""A page in one file, from parts: findings first, tables that sort, figures with their data.

Knows parts, not where they come from; writes HTML, CSS and JavaScript that lie here as sources.
"""

from tdhook_rl.report.page.page import Page, write_report
from tdhook_rl.report.page.parts import (
    Cautions,
    Facts,
    Figure,
    Finding,
    Findings,
    Fragment,
    Gallery,
    Picture,
    Section,
    Table,
)

__all__ = [
    "Cautions",
    "Facts",
    "Figure",
    "Finding",
    "Findings",
    "Fragment",
    "Gallery",
    "Page",
    "Picture",
    "Section",
    "Table",
    "write_report",
]
