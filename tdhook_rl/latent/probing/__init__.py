"""What a policy knows: linear read-outs of its activations."""

from tdhook_rl.latent.probing.class_statistics import ClassStatistics
from tdhook_rl.latent.probing.estimators import (
    BilinearEstimator,
    LinearEstimator,
    LowRankBilinearEstimator,
    MeanDifferenceClassifier,
    TorchEstimator,
)
from tdhook_rl.latent.probing.linear_probe import LinearProbe, ProbeReadout
from tdhook_rl.latent.probing.managers import BilinearProbeManager, ProbeManager
from tdhook_rl.latent.probing.probing import Probing
from tdhook_rl.latent.probing.target_statistics import TargetStatistics

__all__ = [
    "BilinearEstimator", "BilinearProbeManager", "ClassStatistics", "LinearEstimator", "LinearProbe",
    "LowRankBilinearEstimator", "MeanDifferenceClassifier", "ProbeManager", "ProbeReadout", "Probing",
    "TargetStatistics", "TorchEstimator",
]  # fmt: skip
