"""Logs, figures and the single-file report.

Knows results as numbers; no policy, and not where they come from. Nothing below draws or logs by itself.
"""

from tdhook_rl.report.budgets import Budgets
from tdhook_rl.report.contents import page_of
from tdhook_rl.report.media import Animation, Artifact, DataTable, Histogram, Image
from tdhook_rl.report.monitor import Monitor
from tdhook_rl.report.page import (
    Cautions,
    Facts,
    Figure,
    Finding,
    Findings,
    Fragment,
    Gallery,
    Page,
    Section,
    Table,
    write_report,
)
from tdhook_rl.report.page.findings_file import save_findings
from tdhook_rl.report.player import Player, player
from tdhook_rl.report.runs import read_run
from tdhook_rl.report.sinks import (
    FileSink,
    FolderSink,
    LoggerSink,
    Sinks,
    TensorboardSink,
    WandbSink,
    new_folder,
    open_wandb,
)
from tdhook_rl.report.steering import steering_curve, sweep_grid
from tdhook_rl.report.sweep_hook import SweepHook
from tdhook_rl.report.sweep_pages import sweep_page

__all__ = [
    "Animation",
    "Artifact",
    "Budgets",
    "Cautions",
    "DataTable",
    "Facts",
    "Figure",
    "FileSink",
    "Finding",
    "Findings",
    "FolderSink",
    "Fragment",
    "Gallery",
    "Histogram",
    "Image",
    "LoggerSink",
    "Monitor",
    "Page",
    "Player",
    "Section",
    "Sinks",
    "SweepHook",
    "Table",
    "TensorboardSink",
    "WandbSink",
    "new_folder",
    "open_wandb",
    "page_of",
    "player",
    "read_run",
    "save_findings",
    "steering_curve",
    "sweep_grid",
    "sweep_page",
    "write_report",
]
