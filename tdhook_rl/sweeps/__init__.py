"""A direction and its effect: extraction, strengths, controls; and causal tests, in ``causal``.

Knows steering vectors, and any environment whose state is in the TensorDict; no collectors.
"""

from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.sweeps.causal import PatchCell, PatchTable, patch_sites
from tdhook_rl.sweeps.dose_response import DoseResponse, dose_response, first_episode

__all__ = [
    "DoseResponse",
    "PatchCell",
    "PatchTable",
    "SteeringVector",
    "dose_response",
    "first_episode",
    "patch_sites",
]
