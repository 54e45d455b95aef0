"""All kinds of faults, by name."""

from __future__ import annotations

from tests.faults import callbacks, crashes, killing, machine, writing
from tests.faults.fault import Kind

KINDS: dict[str, Kind] = {
    **writing.kinds(),
    **crashes.kinds(),
    **callbacks.kinds(),
    **killing.kinds(),
    **machine.kinds(),
}
