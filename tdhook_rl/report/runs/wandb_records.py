"""The records of a W&B run: a LevelDB log of protocol buffers, read as far as it goes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdhook_rl.files.durable import parse_json

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path, damaged: list[str] | None = None) -> Iterator[Any]:
    """The records of a ``.wandb`` file; what was cut or damaged is left out.

    Args:
        path: the file.
        damaged: is given a line for what is left out.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    damaged = [] if damaged is None else damaged
    data, position = path.read_bytes(), HEADER
    parts: list[bytes] | None = None
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        start, end = position + HEADER, position + HEADER + length
        if kind == 0 and length == 0:  # room that was never written to
            position += room
            continue
        if end > len(data):
            break
        piece = data[start:end]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or length > room - HEADER:
            damaged.append(f"a block at byte {position:,}")
            position, parts = position + room, None
            continue
        position = end
        if zlib.crc32(data[start - 1 : end]) != checksum:
            damaged.append(f"a record at byte {start:,}")
            parts = None
            continue
        if kind in (FULL, FIRST):
            parts = []
        if parts is None:  # the rest of one whose beginning is lost
            continue
        parts.append(piece)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(b"".join(parts))
            except DecodeError:
                damaged.append(f"a record before byte {end:,}")
            else:
                yield record
            parts = None
    if position < len(data) or parts is not None:
        damaged.append(f"its end, from byte {position:,} on")


def items_of(record: Any) -> dict[str, Any]:
    """The entries of a history, a config or a summary by name, those of nested ones below theirs."""
    found: dict[str, Any] = {}
    for item in record:
        keys = list(item.nested_key) or [item.key]
        try:
            value = parse_json(item.value_json)
        except (ValueError, RecursionError):
            continue
        place = found
        for key in keys[:-1]:
            inner = place.get(key)
            if not isinstance(inner, dict):
                inner = place[key] = {}
            place = inner
        place[keys[-1]] = value
    return found
