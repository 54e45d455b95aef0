"""Completeness: do the attributions of a row add up to the change of the target from the baseline?"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.metrics.scoring import Scorer, flat, score


@checked
def completeness_gap(
    hooked: Any,
    data: TensorDictBase,
    *,
    baseline: float | None = None,
    attribution_key: str | None = None,
    target: str | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The sum of the attributions minus f(x) - f(baseline), for each row (Sundararajan et al. 2017, ICML).

    Zero for integrated gradients up to quadrature; plain gradients make no such promise. Best near zero.

    Args:
        hooked: a hooked policy with an attribution method.
        data: a batch that holds its attributions, of any batch shape.
        baseline: a number for all explained inputs; by default the baseline of the method (zero for
            LRP and gradient times input), else ``("baseline", key)`` of the data, else zeros.
        attribution_key: which attribution is scored, by its root; not needed where there is one.
        target: which target is scored, where the method explains several.
        chunk_size: rows per pass; by default all, fewer for convolutional nets.

    Returns:
        the gap, with its sign, of the batch shape.

    Raises:
        InputError: for a policy without an attribution method, with several and none named, or an empty batch.
        MissingKeyError: if the attribution is not in the data.
        TargetError: if several targets are explained and none is named.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import IntegratedGradients
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> with IntegratedGradients(baseline=0.0).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4).double()}, batch_size=3))
        ...     bool((completeness_gap(hooked, data).abs() < 1e-6).all())
        True
    """

    def gap(scorer: Scorer) -> dict[str, Tensor]:
        total = flat(scorer.stored(), scorer.batch_size).sum(-1)
        return {"score": total - (scorer.value(scorer.inputs) - scorer.value(scorer.baseline(baseline)))}

    return score(hooked, data, gap, attribution_key, target, chunk_size)["score"]
