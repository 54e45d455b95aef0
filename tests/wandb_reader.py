"""Read the history of an offline W&B run: a LevelDB log of protocol-buffer records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    data, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


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
    while not _has_ended(path):
        assert time.monotonic() < deadline, "the run's file has no end"
        time.sleep(0.05)
    return history(path)


def _has_ended(path: Path) -> bool:
    try:
        return any(record.WhichOneof("record_type") == "exit" for record in records(path))
    except DecodeError:  # it is being written
        return False
