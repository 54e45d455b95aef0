"""Probes beside what makes a score mean something: splits by group, an untrained network, shuffled labels, futures.

Knows activations of hooked policies and sums of them; not whether batches come from a collector or from a buffer.
"""

from tdhook_rl.probes.probe_table import ProbeCell, ProbeTable
from tdhook_rl.probes.quantities import Future, Return
from tdhook_rl.probes.splits import EPISODE, GroupSplit

__all__ = ["EPISODE", "Future", "GroupSplit", "ProbeCell", "ProbeTable", "Return"]
