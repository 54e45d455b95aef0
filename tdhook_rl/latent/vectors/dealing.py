"""Labels dealt out by chance: the same for a seed, in whatever parts the rows come."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_signs(draws: int, pairs: int, seed: int) -> Tensor:
    """For each draw a sign for each pair, ``(draws, pairs)``: which of the two states counts as which.

    Example:
        >>> signs = random_signs(3, 100, seed=0)
        >>> signs.shape, signs.unique().tolist()
        (torch.Size([3, 100]), [-1.0, 1.0])
    """
    signs = np.random.default_rng(seed).integers(0, 2, (draws, pairs))
    return torch.from_numpy(signs).double() * 2 - 1
