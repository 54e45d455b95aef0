"""What one layer shows at an update, beside what it showed at the first and at the last."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.latent.similarity_spread import (
    LEAST_GROUPS,
    ByGroup,
    crossed_hsic,
    crossed_similarity,
    own_hsic,
    similarity_intervals,
)
from tdhook_rl.metrics.plasticity import Spectrum, check_thresholds, dormant_overlap, unit_scores
from tdhook_rl.rollout.rank_spread import rank_intervals
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import pair_up

#: What is found of each site.
MEASURES = (
    "dormant", "dead", "overlap_first", "overlap_last", "effective_rank", "entropy_rank", "stable_rank", "norm",
    "cka_first", "cka_last",
)  # fmt: skip
#: So many masks are kept, of a bit for each unit.
KEPT = 1000


class SiteHealth:
    """Follows one layer.

    Args:
        tau: see :func:`tdhook_rl.metrics.dormant_units`.
        delta: see :func:`tdhook_rl.metrics.effective_rank`.

    Attributes:
        scores: ``(units,)``, float32: how active each unit was at the last update.
    """

    def __init__(self, tau: float, delta: float) -> None:
        check_thresholds(tau=tau, delta=delta)
        self._tau, self._delta = tau, delta
        self._first: tuple[tuple[bool, Tensor], Tensor] | None = None
        self._last: tuple[tuple[bool, Tensor], Tensor] | None = None
        self._pairs: dict[str, tuple[tuple[bool, Tensor], tuple[bool, Tensor]]] = {}  # that were compared last
        self._features: Tensor | None = None  # of the last update, if all of it was finite
        self._masks: deque[np.ndarray] = deque(maxlen=KEPT)
        self.scores: Tensor | None = None

    def look(
        self,
        activations: Tensor,
        axis: int | tuple[int, ...],
        groups: Tensor | None = None,
        distinct: Tensor | None = None,
    ) -> dict[str, float]:
        """The measures, by name; where an activation is NaN or infinite, NaN, and the share of such states.

        Args:
            activations: ``(states, ...)``.
            axis: the one of the units, or several.
            groups: of the states, such as their episodes: similarities are of states of different ones.
            distinct: which states similarities are of, where some recur.
        """
        usable = torch.isfinite(activations.flatten(1)).all(-1)
        self._pairs, self._features = {}, None
        if not bool(usable.all()):
            return dict.fromkeys(MEASURES, float("nan")) | {"nonfinite": float((~usable).double().mean())}
        scores = unit_scores(activations, axis=axis)
        dormant = scores <= self._tau
        self._features = activations.detach().flatten(1)
        seen = _kept(_of_states(activations, distinct))
        compared = None if groups is None else _of_states(groups, distinct)
        first, mask = self._first = self._first or (seen, dormant)
        last, before = self._last or (None, None)
        spectrum = Spectrum(activations)
        found = {
            "dormant": float(dormant.double().mean()),
            "dead": float((scores <= 0).double().mean()),
            "overlap_first": dormant_overlap(mask, dormant),
            "overlap_last": float("nan") if before is None else dormant_overlap(before, dormant),
            "effective_rank": float(spectrum.effective_rank(self._delta)),
            "entropy_rank": spectrum.entropy_rank(),
            "stable_rank": spectrum.stable_rank(),
            "norm": float(activations.double().flatten(1).norm(dim=-1).mean()),
            "cka_first": _similarity(first, seen, compared),
            "cka_last": float("nan") if last is None else _similarity(last, seen, compared),
        }
        self._pairs = {"cka_first": (first, seen)} | ({} if last is None else {"cka_last": (last, seen)})
        self._last = (seen, dormant)
        self._masks.append(np.packbits(dormant.cpu().numpy()))
        self.scores = scores.float()
        return found

    def intervals(self, groups: Tensor | None, distinct: Tensor | None = None) -> dict[str, Interval]:
        """Of the ranks, norms and similarities of the last update, by the group of each state.

        None of those that are not defined.
        """
        found = {} if self._features is None else rank_intervals(self._features, groups, self._delta)
        compared = None if groups is None else _of_states(groups, distinct)
        for name, pair in self._pairs.items():
            if len(pair[0][1]) >= 4:
                kernels = [one if is_kernel else _kernel(one) for is_kernel, one in pair]
                found[name] = similarity_intervals(kernels, compared)[0][1]
        return {name: one for name, one in found.items() if math.isfinite(one.estimate)}

    def dormancy(self) -> Tensor:
        """``(updates, units)``, bool: which units were dormant at each update in which the site was finite."""
        if self.scores is None:
            return torch.zeros(0, 0, dtype=torch.bool)
        masks = [np.unpackbits(one, count=len(self.scores)) for one in self._masks]
        return torch.from_numpy(np.stack(masks)).bool()


def _of_states(values: Tensor, distinct: Tensor | None) -> Tensor:
    return values if distinct is None else values[distinct.to(values.device)]


def _kept(activations: Tensor) -> tuple[bool, Tensor]:
    """What a later similarity needs: the features, or, where there are more of them than states, their kernel."""
    flat = activations.flatten(1)
    if flat.shape[1] > len(flat) >= 4:
        return True, _kernel(flat)
    return False, flat.clone()


def _kernel(flat: Tensor) -> Tensor:
    return CkaEstimator(debiased=True).kernel_matrix(flat)


def _similarity(one: tuple[bool, Tensor], other: tuple[bool, Tensor], groups: Tensor | None) -> float:
    """Debiased linear CKA, of states of different groups where there are four.

    NaN where it is not defined: too few states, or features that are the same in all.
    """
    usual = _among_all(one, other)
    if groups is None or not math.isfinite(usual):
        return usual
    numbers = torch.from_numpy(pair_up(len(one[1]), groups)).to(one[1].device)
    count = int(numbers.max()) + 1
    if not LEAST_GROUPS <= count < len(numbers):
        return usual
    sides = [_by_group(side, numbers, count) for side in (one, other)]
    return float(crossed_similarity(crossed_hsic(*sides)[0], [own_hsic(side) for side in sides])[-1])


def _by_group(side: tuple[bool, Tensor], numbers: Tensor, count: int) -> ByGroup:
    is_kernel, values = side
    if not is_kernel and count * values.shape[1] ** 2 <= len(values) ** 2:
        return ByGroup(numbers, features=values.double() - values.double().mean(0))
    return ByGroup(numbers, kernel=values if is_kernel else _kernel(values))


def _among_all(one: tuple[bool, Tensor], other: tuple[bool, Tensor]) -> float:
    if one[0]:
        return float((one[1] * other[1]).sum())
    if len(one[1]) < 4:
        return float("nan")
    pair = TensorDict({"data_a": one[1].double(), "data_b": other[1].double()})
    return float(CkaEstimator(debiased=True)(pair)["cka"])
