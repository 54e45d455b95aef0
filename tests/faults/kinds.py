"""All kinds of faults, by name."""

from __future__ import annotations

from tests.faults import callbacks, crashes, hostile, killing, machine, writing
from tests.faults.fault import Kind

ROOMS = (writing, crashes, callbacks, killing, hostile, machine)
KINDS: dict[str, Kind] = {name: kind for room in ROOMS for name, kind in room.kinds().items()}
