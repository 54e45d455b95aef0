"""What a direction does: strengths, controls and outcomes, in any environment; and causal tests, in ``causal``.

Knows steering vectors and environments; no collectors.
"""

from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.sweeps.causal import (
    AblationCell,
    AblationTable,
    Agreement,
    Circuit,
    CurvePoint,
    PatchCell,
    PatchTable,
    UnitCell,
    UnitTable,
    ablate_units,
    attribution_patching,
    faithfulness,
    find_circuit,
    patch_paths,
    patch_sites,
    patch_units,
)
from tdhook_rl.sweeps.conditions import Condition
from tdhook_rl.sweeps.episodes import first_episode
from tdhook_rl.sweeps.steering_sweep import steering_sweep
from tdhook_rl.sweeps.sweep_result import SweepResult
from tdhook_rl.sweeps.sweep_table import SweepRow, SweepTable

__all__ = [
    "AblationCell",
    "AblationTable",
    "Agreement",
    "Circuit",
    "Condition",
    "CurvePoint",
    "PatchCell",
    "PatchTable",
    "SteeringVector",
    "SweepResult",
    "SweepRow",
    "SweepTable",
    "UnitCell",
    "UnitTable",
    "ablate_units",
    "attribution_patching",
    "faithfulness",
    "find_circuit",
    "first_episode",
    "patch_paths",
    "patch_sites",
    "patch_units",
    "steering_sweep",
]
