"""What a policy represents: reading, patching and steering activations.

Knows sites, and places hooks that read or change what runs there; neither attributions nor collectors.
"""

from tdhook_rl.latent.activation_addition import ActivationAddition
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.activation_patching import ActivationPatching
from tdhook_rl.latent.control_record import ControlRecord
from tdhook_rl.latent.cosines import Cosines, cosines
from tdhook_rl.latent.directions import DirectionalAblation, DirectionClamping
from tdhook_rl.latent.gates import AtSteps, ProbeGate, RowFunction
from tdhook_rl.latent.map_patch import MapPatch
from tdhook_rl.latent.principal_directions import principal_directions
from tdhook_rl.latent.state_subtraction import StateSubtraction
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.latent.steering_vectors import SteeringVectors
from tdhook_rl.latent.unit_values import UnitValues

__all__ = [
    "ActivationAddition",
    "ActivationCaching",
    "ActivationPatching",
    "AtSteps",
    "ControlRecord",
    "Cosines",
    "DirectionClamping",
    "DirectionalAblation",
    "MapPatch",
    "ProbeGate",
    "RowFunction",
    "StateSubtraction",
    "SteeringVector",
    "SteeringVectors",
    "UnitValues",
    "cosines",
    "principal_directions",
]
