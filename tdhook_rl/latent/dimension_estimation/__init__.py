"""How many directions a representation uses: intrinsic dimension, global and around each point."""

from tdhook_rl.latent.dimension_estimation.local import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
)
from tdhook_rl.latent.dimension_estimation.two_nn import TwoNnDimensionEstimator

__all__ = [
    "CaPcaDimensionEstimator",
    "LocalKnnDimensionEstimator",
    "LocalPcaDimensionEstimator",
    "TwoNnDimensionEstimator",
]
