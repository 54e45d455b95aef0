"""Metrics that change inputs a little, at random, many times.

Infidelity: does an attribution foretell how the explained target changes when the input does? Max-sensitivity: how
much does an attribution change when its input hardly does?
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import Checked, checked, require_counts
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.metrics.row_draws import RowDraws
from tdhook_rl.metrics.scoring import ScoreDirection, Scorer, flat, require_floats, score

#: From ``torch.rand`` or ``torch.randn`` and a tensor to numbers of its shape, by the generator of the metric.
Draw = Callable[[Callable[..., Tensor], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PerturbedMetric(metaclass=Checked):
    """Base of these metrics: perturbations of each row, drawn by a generator of its own, and a score from each."""

    n_perturb_samples: int = 10
    attribution_key: str | None = None
    target: str | None = None
    seed: int = 0
    chunk_size: int | None = None

    score_direction: ClassVar[ScoreDirection] = ScoreDirection.LOWER

    def __post_init__(self) -> None:
        require_counts(n_perturb_samples=self.n_perturb_samples)

    @checked
    def __call__(self, hooked: Any, data: TensorDictBase) -> Tensor:
        def scores(scorer: Scorer) -> dict[str, Tensor]:
            require_floats(scorer, type(self).__name__)
            draws = RowDraws(self.seed, "perturbations", scorer.rows)
            return {"score": self._score(scorer, lambda how, like: draws(how, like, len(scorer.batch_size)))}

        return score(hooked, data, scores, self.attribution_key, self.target, self.chunk_size)["score"]

    @abstractmethod
    def _score(self, scorer: Scorer, draw: Draw) -> Tensor:
        """One number for each row."""


Form = Literal["auto", "gradient", "product"]


@dataclass(frozen=True, kw_only=True)
class InfidelityMetric(PerturbedMetric):
    """Infidelity (Yeh, Hsieh, Suggala, Inouye & Ravikumar 2019, NeurIPS), the mean of a squared error.

    With Gaussian perturbations ``I`` of the explained inputs ``x``, an attribution and the target ``f`` that it
    explains (by the stored action, never a new sample):

    - ``form="gradient"``: E[(I . attr - (f(x) - f(x - I)))^2], ``I`` of standard deviation ``noise_scale``;
    - ``form="product"``, for attributions that are a sensitivity times input minus baseline: the same with
      ``attr / (x - baseline)`` in the place of ``attr`` and ``I = s (x - baseline)``, ``s`` of standard deviation
      ``noise_scale``; so ``I . attr / (x - baseline)`` is ``s . attr`` and nothing is divided by zero. Inputs that
      equal their baseline are not perturbed.

    Zero for a linear policy with either; lower is better. Values are in squared units of the target and grow with
    ``noise_scale`` squared, so compare methods at one setting and one form.

    Args:
        n_perturb_samples: perturbations for each row.
        noise_scale: their standard deviation.
        form: ``"auto"`` takes the form from the method: the product for LRP, for IntegratedGradients as it is by
            default, for occlusion, and wherever ``multiply_by_inputs=True``; else the gradient.
        baseline: of the product form, a number; by default the one of the method (zero for LRP and gradient times
            input).
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
        >>> with Saliency().prepare(torch.nn.Linear(4, 1).double()) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4).double()}, batch_size=3))
        ...     found = InfidelityMetric()(hooked, data)
        >>> found.shape, bool((found < 1e-20).all())
        (torch.Size([3]), True)
    """

    n_perturb_samples: int = field(default=10, kw_only=False)
    noise_scale: float = 0.01
    form: Form = "auto"
    baseline: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_scale > 0:
            raise InputError(f"noise_scale is a positive number, got {self.noise_scale!r}")
        if self.form not in get_args(Form):
            raise InputError(f"no form is named {self.form!r}; {nearest(self.form, get_args(Form))}")

    def _score(self, scorer: Scorer, draw: Draw) -> Tensor:
        attributions = flat(scorer.stored(), scorer.batch_size)
        here = scorer.value(scorer.inputs)
        product = scorer.is_product if self.form == "auto" else self.form == "product"
        baseline = scorer.baseline(self.baseline) if product else {}
        total = torch.zeros_like(here)
        for _ in range(self.n_perturb_samples):
            noise = {key: self.noise_scale * draw(torch.randn, x) for key, x in scorer.inputs.items()}
            foretold = (flat(noise, scorer.batch_size) * attributions).sum(-1)
            moved = {
                key: x - noise[key] * (x - baseline[key]) if product else x - noise[key]
                for key, x in scorer.inputs.items()
            }
            total += (foretold - (here - scorer.value(moved))) ** 2
        return total / self.n_perturb_samples


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
