"""Where :class:`tdhook_rl.latent.SteeringVector` was until 0.1."""

from tdhook_rl.latent.steering_vector import SteeringVector

__all__ = ["SteeringVector"]
