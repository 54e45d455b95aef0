"""How many directions a representation uses: intrinsic dimension, global and around each point."""

from tdhook_rl.latent.dimension_estimation.ca_pca import CaPcaDimensionEstimator
from tdhook_rl.latent.dimension_estimation.local_knn import LocalKnnDimensionEstimator
from tdhook_rl.latent.dimension_estimation.local_pca import LocalPcaDimensionEstimator
from tdhook_rl.latent.dimension_estimation.two_nn import TwoNnDimensionEstimator

__all__ = [
    "CaPcaDimensionEstimator",
    "LocalKnnDimensionEstimator",
    "LocalPcaDimensionEstimator",
    "TwoNnDimensionEstimator",
]
