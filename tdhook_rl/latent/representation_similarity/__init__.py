"""How alike two representations of the same inputs are: kernel alignment, and which one predicts the other."""

from tdhook_rl.latent.representation_similarity.cka import CkaEstimator
from tdhook_rl.latent.representation_similarity.information_imbalance import InformationImbalanceEstimator

__all__ = ["CkaEstimator", "InformationImbalanceEstimator"]
