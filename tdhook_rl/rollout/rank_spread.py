"""How sure the ranks and the norm of the features of a layer are: by the group of each state."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tdhook_rl.metrics.plasticity import Spectrum
from tdhook_rl.statistics import Interval, grouped_mean, jackknife
from tdhook_rl.statistics.interval import pair_up

#: Into so many parts groups are dealt, each of which is left out once.
PARTS = 20


def rank_intervals(features: Tensor, groups: Tensor | None) -> dict[str, Interval]:
    """The ranks by entropy and by the largest singular value, and the mean norm, with intervals.

    They are of other states as many as these: a rank grows with them. Effective rank has none: it is a whole number,
    mostly the same without any of the parts, which says nothing about how far it scatters.

    Args:
        features: ``(states, features)``.
        groups: of the states; each its own unless given.
    """
    numbers = torch.from_numpy(pair_up(len(features), groups))
    held = int(numbers.max()) + 1
    # Many groups are dealt into parts at random: one decomposition for each.
    part = (torch.randperm(held, generator=torch.Generator().manual_seed(0)) % PARTS)[numbers].to(features.device)
    whole = Spectrum(features)
    left = [Spectrum(features[part != one]) for one in range(min(held, PARTS))] if held > 1 else [whole]
    found = {
        "entropy_rank": jackknife(whole.entropy_rank(), [one.entropy_rank() for one in left], rows=len(features)),
        "stable_rank": jackknife(whole.stable_rank(), [one.stable_rank() for one in left], rows=len(features)),
    }
    found = {name: replace(one, groups=held, low=max(one.low, 0.0)) for name, one in found.items()}
    return found | {"norm": grouped_mean(features.double().norm(dim=-1), groups)}
