"""Where results are streamed while the agent trains: local files always, W&B or another logger beside them."""

from tdhook_rl.report.sinks.base import LoggerSink
from tdhook_rl.report.sinks.file import FileSink
from tdhook_rl.report.sinks.folder import FolderSink, new_folder
from tdhook_rl.report.sinks.loggers import TensorboardSink, WandbSink, sink_of
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.report.sinks.together import Sink, Sinks, open_wandb, sinks_of

__all__ = [
    "PREFIX",
    "FileSink",
    "FolderSink",
    "LoggerSink",
    "Sink",
    "Sinks",
    "TensorboardSink",
    "WandbSink",
    "new_folder",
    "open_wandb",
    "sink_of",
    "sinks_of",
]
