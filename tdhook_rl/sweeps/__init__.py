"""A direction and its effect: extraction, strengths, controls."""

from tdhook_rl.sweeps.dose_response import DoseResponse, dose_response, first_episode
from tdhook_rl.sweeps.steering_vector import SteeringVector

__all__ = ["DoseResponse", "SteeringVector", "dose_response", "first_episode"]
