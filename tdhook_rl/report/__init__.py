"""Logs, figures and the single-file report.

Knows results as numbers; no policy, and not where they come from. Nothing below draws or logs by itself.
"""

from tdhook_rl.report.budgets import Budgets
from tdhook_rl.report.media import Animation, Artifact, DataTable, Histogram, Image
from tdhook_rl.report.monitor import Monitor
from tdhook_rl.report.page import Figure, Page, Table, write_report
from tdhook_rl.report.player import Player, player
from tdhook_rl.report.sinks import (
    FileSink,
    FolderSink,
    LoggerSink,
    Sinks,
    TensorboardSink,
    WandbSink,
    new_folder,
    open_sinks,
    open_wandb,
)

__all__ = [
    "Animation",
    "Artifact",
    "Budgets",
    "DataTable",
    "Figure",
    "FileSink",
    "FolderSink",
    "Histogram",
    "Image",
    "LoggerSink",
    "Monitor",
    "Page",
    "Player",
    "Sinks",
    "Table",
    "TensorboardSink",
    "WandbSink",
    "new_folder",
    "open_sinks",
    "open_wandb",
    "player",
    "write_report",
]
