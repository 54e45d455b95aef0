"""What a policy looks at: attribution of decisions and values to inputs and activations."""

from tdhook_rl.attribution.integrated_gradients import IntegratedGradients
from tdhook_rl.attribution.saliency import Saliency

__all__ = ["IntegratedGradients", "Saliency"]
