"""Which penalty a probe gets: the one whose probe tells the concept best in groups that it was not fitted on.

Chosen from sums alone: the training groups are halved, each half is solved with every penalty, and the other half says
how far apart the classes lie in units of their spread. No row is kept for it, and the sums of workers add up first.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the diagonal of the covariance of features that are scaled to variance 1.
PENALTIES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def expected_accuracy(weight: Tensor, centres: Tensor, within: Tensor, there: Tensor) -> Tensor:
    """How often two classes are told apart by the best threshold, if scores were normal, as a mean over pairs.

    Args:
        weight: ``(..., classes, features)`` of the probes.
        centres: ``(..., classes, features)``, the means of the classes in other groups.
        within: ``(..., classes, classes)``, the covariance of the scores within classes there.
        there: ``(..., classes)``, which classes have rows.

    Returns:
        ``(...)``; NaN where there is no pair.
    """
    means = weight @ centres.mT  # (..., weight of, mean of)
    own = means.diagonal(dim1=-2, dim2=-1)
    apart = own[..., :, None] + own[..., None, :] - means - means.mT
    variances = within.diagonal(dim1=-2, dim2=-1)
    spread = (variances[..., :, None] + variances[..., None, :] - within - within.mT).clamp_min(0).sqrt()
    accuracy = torch.special.ndtr(apart / (2 * spread.clamp_min(1e-150)))
    pairs = (there[..., :, None] & there[..., None, :]).triu(1)
    return (accuracy * pairs).sum((-2, -1)) / pairs.sum((-2, -1))
