"""Max-sensitivity: how much does an attribution change when its input hardly does?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.metrics.perturbed import Draw, PerturbedMetric
from tdhook_rl.metrics.scoring import Scorer, flat

__all__ = ["SensitivityMetric"]


@dataclass(frozen=True, kw_only=True)
class SensitivityMetric(PerturbedMetric):
    """Max-sensitivity (Yeh et al. 2019, NeurIPS), relative: max over d of ||attr(x + d) - attr(x)|| / ||attr(x)||.

    The d are uniform in [-``perturb_radius``, ``perturb_radius``] in every explained input; the norm is Euclidean
    over all explained inputs of a row, and the stored action stays the explained one. Baselines stay where they
    are. A row whose attribution is zero scores 0 where it stays zero and infinity where it does not. Lower is
    better, but a constant attribution has the best score of all: read it beside
    :class:`tdhook_rl.metrics.InfidelityMetric`.

    Args:
        perturb_radius: largest change of an input.
        n_perturb_samples: perturbations for each row.
        attribution_key: which attribution is scored, by its root; not needed where there is one.
        target: which target is scored, where the method explains several.
        seed: of the perturbations.
        chunk_size: rows per pass; by default all, fewer for convolutional nets.

    Called with a hooked policy and data that hold attributions, returns a score for each row, the batch shape.

    Raises:
        InputError: for a policy without an attribution method, with several and none named, or an empty batch.
        MissingKeyError: if the attribution is not in the data.
        TargetError: if several targets are explained and none is named.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import Saliency
        >>> with Saliency().prepare(torch.nn.Linear(4, 1)) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        ...     SensitivityMetric()(hooked, data)
        tensor([0., 0., 0.])
    """

    perturb_radius: float = field(default=0.02, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.perturb_radius > 0:
            raise InputError(f"perturb_radius is a positive number, got {self.perturb_radius!r}")

    def _score(self, scorer: Scorer, draw: Draw) -> Tensor:
        here = flat(scorer.stored(), scorer.batch_size)
        largest = torch.zeros_like(here[..., 0])
        for _ in range(self.n_perturb_samples):
            shift = {key: (2 * draw(torch.rand, x) - 1) * self.perturb_radius for key, x in scorer.inputs.items()}
            moved = scorer.attribute({key: x + shift[key] for key, x in scorer.inputs.items()})
            change = (flat(moved, scorer.batch_size) - here).norm(dim=-1)
            largest = torch.maximum(largest, change)
        ratio = largest / here.norm(dim=-1)
        return torch.where(largest == 0, largest, ratio)
