"""What the metrics share that change inputs a little, at random, many times."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import Checked, checked
from tdhook_rl.metrics.scoring import ScoreDirection, Scorer, require_count, require_floats, score

__all__ = ["Draw", "PerturbedMetric"]

#: From ``torch.rand`` or ``torch.randn`` and a tensor to numbers of its shape, by the generator of the metric.
Draw = Callable[[Callable[..., Tensor], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PerturbedMetric(metaclass=Checked):
    """Base of these metrics.

    Args:
        n_perturb_samples: perturbations for each row.
        attribution_key: which attribution is scored, by its root; not needed where there is one.
        target: which target is scored, where the method explains several.
        seed: of the perturbations.
        chunk_size: rows per pass; by default all, fewer for convolutional nets.
    """

    n_perturb_samples: int = 10
    attribution_key: str | None = None
    target: str | None = None
    seed: int = 0
    chunk_size: int | None = None

    score_direction: ClassVar[ScoreDirection] = ScoreDirection.LOWER

    def __post_init__(self) -> None:
        require_count("n_perturb_samples", self.n_perturb_samples)

    @checked
    def __call__(self, hooked: Any, data: TensorDictBase) -> Tensor:
        generators: dict[torch.device, torch.Generator] = {}

        def draw(how: Callable[..., Tensor], like: Tensor) -> Tensor:
            if like.device not in generators:
                generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
            return how(like.shape, generator=generators[like.device], dtype=like.dtype, device=like.device)

        def scores(scorer: Scorer) -> dict[str, Tensor]:
            require_floats(scorer, type(self).__name__)
            return {"score": self._score(scorer, draw)}

        return score(hooked, data, scores, self.attribution_key, self.target, self.chunk_size)["score"]

    @abstractmethod
    def _score(self, scorer: Scorer, draw: Draw) -> Tensor:
        """One number for each row."""
