"""A direction and its effect: extraction, strengths, controls; and causal tests, in ``causal``.

Knows steering vectors, and any environment whose state is in the TensorDict; no collectors.
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
from tdhook_rl.sweeps.dose_response import DoseResponse, dose_response, first_episode

__all__ = [
    "AblationCell",
    "AblationTable",
    "Agreement",
    "Circuit",
    "CurvePoint",
    "DoseResponse",
    "PatchCell",
    "PatchTable",
    "SteeringVector",
    "UnitCell",
    "UnitTable",
    "ablate_units",
    "attribution_patching",
    "dose_response",
    "faithfulness",
    "find_circuit",
    "first_episode",
    "patch_paths",
    "patch_sites",
    "patch_units",
]
