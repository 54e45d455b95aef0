"""Causal tests: what happens to the decision where an activation is put in, along a path, or taken out.

Knows how a policy is hooked and run, targets and statistics; no environments but the one that an ablation is given.
"""

from tdhook_rl.sweeps.causal.ablation import AblationCell, AblationTable, ablate_units
from tdhook_rl.sweeps.causal.agreement import Agreement
from tdhook_rl.sweeps.causal.attribution import attribution_patching, patch_units
from tdhook_rl.sweeps.causal.circuits import faithfulness, find_circuit
from tdhook_rl.sweeps.causal.found_circuit import Circuit, CurvePoint
from tdhook_rl.sweeps.causal.patch_sites import patch_sites
from tdhook_rl.sweeps.causal.patch_table import PatchCell, PatchTable
from tdhook_rl.sweeps.causal.paths import patch_paths
from tdhook_rl.sweeps.causal.unit_table import UnitCell, UnitTable

__all__ = [
    "AblationCell",
    "AblationTable",
    "Agreement",
    "Circuit",
    "CurvePoint",
    "PatchCell",
    "PatchTable",
    "UnitCell",
    "UnitTable",
    "ablate_units",
    "attribution_patching",
    "faithfulness",
    "find_circuit",
    "patch_paths",
    "patch_sites",
    "patch_units",
]
