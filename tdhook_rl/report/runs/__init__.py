"""Reading runs, whoever has written them and however they ended: one plain record of each.

Knows files, not what is shown of them. What cannot be read is left out and noted.
"""

from tdhook_rl.report.runs.kinds import read_run
from tdhook_rl.report.runs.record import Bins, Drawn, Kept, Rows, Run, Shown

__all__ = ["Bins", "Drawn", "Kept", "Rows", "Run", "Shown", "read_run"]
