"""What a page says of runs: answers, cautions, figures, pictures, tables.

Knows the names that a monitor gives, and nothing of how runs are read or pages written.
"""

from tdhook_rl.report.contents.composed import page_of

__all__ = ["page_of"]
