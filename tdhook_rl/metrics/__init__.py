"""How far an attribution can be trusted (faithfulness, robustness, randomisation, localisation); a layer's health.

Knows attributions, and asks the policies that they are of; not where the data comes from.
"""

from tdhook_rl.metrics.completeness import completeness_gap
from tdhook_rl.metrics.deletion import DeletionInsertion, deletion_insertion
from tdhook_rl.metrics.drift import action_churn, policy_divergence, value_drift
from tdhook_rl.metrics.localisation import pointing_game, relevance_mass
from tdhook_rl.metrics.norms import gradient_norms, spectral_norms, weight_norms
from tdhook_rl.metrics.perturbed import InfidelityMetric, SensitivityMetric
from tdhook_rl.metrics.plasticity import (
    dormant_overlap,
    dormant_units,
    effective_rank,
    entropy_rank,
    stable_rank,
    unit_scores,
)
from tdhook_rl.metrics.randomisation import cascading_randomisation
from tdhook_rl.metrics.refitting import random_target_loss
from tdhook_rl.metrics.scoring import ScoreDirection
from tdhook_rl.metrics.untrained import untrained_copy

__all__ = [
    "DeletionInsertion",
    "InfidelityMetric",
    "ScoreDirection",
    "SensitivityMetric",
    "action_churn",
    "cascading_randomisation",
    "completeness_gap",
    "deletion_insertion",
    "dormant_overlap",
    "dormant_units",
    "effective_rank",
    "entropy_rank",
    "gradient_norms",
    "pointing_game",
    "policy_divergence",
    "random_target_loss",
    "relevance_mass",
    "spectral_norms",
    "stable_rank",
    "unit_scores",
    "untrained_copy",
    "value_drift",
    "weight_norms",
]
