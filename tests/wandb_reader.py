"""Read the history of an offline W&B run, as the report does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tdhook_rl.report.runs.wandb_records import records

__all__ = ["finished", "history", "records"]


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, oldest first."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def finished(run: Any) -> list[dict[str, Any]]:
    """End a run, and its rows; the file is complete a moment later."""
    run.finish()
    (path,) = Path(run.settings.sync_dir).glob("*.wandb")
    deadline = time.monotonic() + 20
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < deadline, "the run's file has no end"
        time.sleep(0.05)
    return history(path)
