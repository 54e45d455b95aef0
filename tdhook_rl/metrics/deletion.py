"""Deletion and insertion: does the target fall fast when the features ranked first go, and rise when they come?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.metrics.row_draws import RowDraws
from tdhook_rl.metrics.scoring import ScoreDirection, Scorer, flat, score


@dataclass(frozen=True)
class DeletionInsertion:
    """Curves of the target and the areas under them; a faithful ranking has low deletion and high insertion.

    All are NaN in rows that have no attribution: those whose ``("computed", root)`` is false, or with a NaN.

    Attributes:
        deletion: area under the deletion curve, the batch shape. Lower is better.
        insertion: area under the insertion curve, the batch shape. Higher is better.
        random: mean area of random rankings, the batch shape; it is the same for deletion and for insertion, as
            to delete in one random order is to insert in its reverse.
        deletion_curve: the target after each step, batch + ``(points,)``; first at the input.
        insertion_curve: likewise; first at the baseline.
        shares: the shares of features replaced or put in, ``(points,)``, from 0 to 1.
    """

    deletion: Tensor
    insertion: Tensor
    random: Tensor
    deletion_curve: Tensor
    insertion_curve: Tensor
    shares: Tensor

    score_directions: ClassVar[dict[str, ScoreDirection]] = {
        "deletion": ScoreDirection.LOWER,
        "insertion": ScoreDirection.HIGHER,
    }


@checked
def deletion_insertion(
    hooked: Any,
    data: TensorDictBase,
    *,
    baseline: float | None = None,
    absolute: bool = False,
    n_steps: int = 20,
    n_random: int = 10,
    attribution_key: str | None = None,
    target: str | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
) -> DeletionInsertion:
    """The target as the most relevant features are replaced by the baseline, or put into it (Petsiuk et al. 2018).

    Features are ranked in each row by its attribution, all explained inputs together; each entry of an input is a
    feature. Areas are in units of the target, over shares of features from 0 to 1, by the trapezoidal rule. The
    explained action stays the stored one.

    Args:
        hooked: a hooked policy with an attribution method.
        data: a batch that holds its attributions, of any batch shape.
        baseline: a number for all explained inputs; by default the baseline of the method (zero for
            LRP and gradient times input), else ``("baseline", key)`` of the data, else zeros.
        absolute: rank by the absolute value; right for plain gradients, whose sign does not say whether a
            feature raises the target above its value at the baseline.
        n_steps: steps of a curve, one for each feature if there are fewer.
        n_random: random rankings to compare with.
        attribution_key: which attribution is scored, by its root; not needed where there is one.
        target: which target is scored, where the method explains several.
        seed: of the random rankings.
        chunk_size: rows per pass; by default all, fewer for convolutional nets.

    Raises:
        InputError: for a policy without an attribution method, with several and none named, or an empty batch.
        MissingKeyError: if the attribution is not in the data.
        TargetError: if several targets are explained and none is named.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import IntegratedGradients
        >>> with IntegratedGradients(baseline=0.0).prepare(torch.nn.Linear(4, 1)) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        ...     found = deletion_insertion(hooked, data)
        >>> bool((found.deletion < found.random).all()), bool((found.insertion > found.random).all())
        (True, True)
    """
    require_counts(n_steps=n_steps, n_random=n_random)
    seen: list[Tensor] = []

    def curves(scorer: Scorer) -> dict[str, Tensor]:
        values = flat(scorer.stored(), scorer.batch_size)
        features = values.shape[-1]
        points = min(n_steps, features) + 1
        counts = [round(features * step / (points - 1)) for step in range(points)]
        shares = torch.tensor(counts, dtype=values.dtype, device=values.device) / features
        seen[:] = [shares]
        low = scorer.baseline(baseline)

        def curve(ranks: Tensor, first: dict[NestedKey, Tensor], then: dict[NestedKey, Tensor]) -> Tensor:
            """The target as features, in the order of their ranks, change from the one to the other."""
            return torch.stack([scorer.value(_mix(ranks < count, first, then)) for count in counts], -1)

        ranks = _ranks(values.abs() if absolute else values)
        deletion, insertion = curve(ranks, scorer.inputs, low), curve(ranks, low, scorer.inputs)
        random, draws = torch.zeros_like(deletion[..., 0]), RowDraws(seed, "rankings", scorer.rows)
        for _ in range(n_random):
            order = _ranks(draws(torch.rand, values, len(scorer.batch_size)))
            random += torch.trapezoid(curve(order, scorer.inputs, low), shares)
        return {
            "deletion": torch.trapezoid(deletion, shares),
            "insertion": torch.trapezoid(insertion, shares),
            "random": random / n_random,
            "deletion_curve": deletion,
            "insertion_curve": insertion,
        }

    found = score(hooked, data, curves, attribution_key, target, chunk_size)
    return DeletionInsertion(**found, shares=seen[0])


def _ranks(values: Tensor) -> Tensor:
    """0 for the largest entry of a row, 1 for the next."""
    return torch.argsort(values, dim=-1, descending=True, stable=True).argsort(-1)


def _mix(chosen: Tensor, first: dict[NestedKey, Tensor], then: dict[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
    """``then`` where chosen, else ``first``; ``chosen`` has the features of all inputs one after another."""
    rows = chosen[..., 0].numel()
    parts = chosen.split([value.numel() // rows for value in first.values()], -1)
    return {
        key: torch.where(part.reshape(value.shape), then[key], value)
        for part, (key, value) in zip(parts, first.items(), strict=True)
    }
