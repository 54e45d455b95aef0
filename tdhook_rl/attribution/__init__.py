"""What a policy looks at: attribution of decisions and values to inputs and activations.

Knows calls and their replays, and asks them for gradients, relevance or perturbed passes; neither latent methods nor
how an attribution is scored.
"""

from tdhook_rl.attribution.activation_maximisation import ActivationMaximisation
from tdhook_rl.attribution.grad_cam import DimsConfig, GradCAM
from tdhook_rl.attribution.groups import windows
from tdhook_rl.attribution.guided_backpropagation import GuidedBackpropagation
from tdhook_rl.attribution.integrated_gradients import IntegratedGradients
from tdhook_rl.attribution.lrp import LRP
from tdhook_rl.attribution.perturbation import SARFA, Occlusion, PerturbationSaliency
from tdhook_rl.attribution.saliency import Saliency

__all__ = [
    "LRP",
    "SARFA",
    "ActivationMaximisation",
    "DimsConfig",
    "GradCAM",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "Occlusion",
    "PerturbationSaliency",
    "Saliency",
    "windows",
]
