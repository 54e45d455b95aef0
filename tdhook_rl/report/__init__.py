"""Logs, figures and the single-file report."""

from tdhook_rl.report.html import Figure, Table, write_report
from tdhook_rl.report.sinks import FileSink, LoggerSink, Sinks, new_folder, open_sinks, open_wandb

__all__ = [
    "Figure",
    "FileSink",
    "LoggerSink",
    "Sinks",
    "Table",
    "new_folder",
    "open_sinks",
    "open_wandb",
    "write_report",
]
