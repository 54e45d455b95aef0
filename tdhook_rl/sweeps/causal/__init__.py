"""Causal tests: what happens to the decision where an activation is put in, along a path, or taken out.

Knows how a policy is hooked and run, targets and statistics; no environments but the one that an ablation is given.
"""

from tdhook_rl.sweeps.causal.patch_sites import patch_sites
from tdhook_rl.sweeps.causal.patch_table import PatchCell, PatchTable

__all__ = ["PatchCell", "PatchTable", "patch_sites"]
