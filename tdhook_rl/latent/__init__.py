"""What a policy represents: reading, patching and steering activations."""

from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.steering_vectors import SteeringVectors

__all__ = ["ActivationCaching", "SteeringVectors"]
