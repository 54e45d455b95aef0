"""What a policy knows: linear read-outs of its activations."""

from tdhook_rl.latent.probing.linear_probe import LinearProbe, ProbeReadout
from tdhook_rl.latent.probing.statistics import ClassStatistics

__all__ = ["ClassStatistics", "LinearProbe", "ProbeReadout"]
