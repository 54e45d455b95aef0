"""Infidelity: does an attribution foretell how the explained target changes when the input does?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tdhook_rl.errors import InputError, nearest
from tdhook_rl.metrics.perturbed import Draw, PerturbedMetric
from tdhook_rl.metrics.scoring import Scorer, flat

__all__ = ["InfidelityMetric"]

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
            raise InputError(f"no form is named {self.form!r}; {nearest(str(self.form), get_args(Form))}")

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
