"""What was drawn, from what is stored: the action before later modules mapped it, and the noise behind a sample.

The stored action of such a policy is the mapped one, and a log-probability is of the drawn one. A mapping is inverted
where that can be checked: a choice by trying every one, a number elementwise, where the mapping is strictly monotone
around it and nothing further off gives the same. Elsewhere there is no answer. With the noise, a sample follows the
parameters of its distribution as ``rsample`` does; it is found for families whose samples are a known function of
parameters and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch import distributions as D

from tdhook_rl.internals.torch_names import cholesky_factor

#: How far around a number a mapping is looked at, how steep it has to be there, and where the number is looked for.
STEP, SLOPE, REACH = 1e-2, 1e-3, 1e3
#: How far off on both sides it is looked at, too: numbers that give the same (a size, an angle) are not told apart.
FAR = (0.1, 0.3, 1.0, 2.0, 4.0, 10.0, 100.0, REACH)
_HALVINGS = 60

Candidates = tuple[Sequence[Tensor], int]


def invert(
    data: TensorDictBase,
    key: NestedKey,
    stored: Tensor,
    rewriters: Sequence[nn.Module],
    like: Tensor,
    choose: Candidates | None,
) -> Tensor | None:
    """The sample from which modules make the stored entry; ``None`` where it is not known.

    Args:
        data: what the policy has computed until the draw.
        key: under which the sample is drawn and the stored entry is found.
        stored: that entry.
        rewriters: the modules that write over the key, in order.
        like: a tensor of the shape and type of samples.
        choose: what may have been drawn, where it is one of a few, and how many dimensions say where.
    """

    def mapped(value: Tensor) -> Tensor:
        scratch = data.copy()
        scratch.set(key, value.clone())  # a module may write over it in place
        for module in rewriters:
            scratch = module(scratch)
        return scratch.get(key)

    try:
        with torch.no_grad():
            found = _by_trying(mapped, stored, choose) if choose else _by_bisection(mapped, stored, like)
            return found if found is not None and _same(mapped(found), stored) else None
    except (RuntimeError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None  # it reads what is not there yet, or takes samples only that it knows


def choices(distribution: D.Distribution) -> Candidates | None:
    """The samples that a discrete distribution may give, each for all its rows; ``None`` for numbers."""
    rows = distribution.batch_shape
    if is_one_hot(distribution):
        number = distribution.param_shape[-1]  # type: ignore[attr-defined]
        return one_hot_choices(torch.zeros(*rows, number, dtype=torch.long, device=_device(distribution))), len(rows)
    if isinstance(distribution, D.Categorical):
        device = _device(distribution)
        return [torch.full(rows, index, device=device) for index in range(distribution.param_shape[-1])], len(rows)
    base = distribution.base_dist if isinstance(distribution, D.Independent) else distribution
    if isinstance(base, D.Bernoulli):
        return [torch.full_like(base.probs, value) for value in (0.0, 1.0)], base.probs.ndim
    return None


def one_hot_choices(like: Tensor) -> list[Tensor]:
    """Every one-hot vector, in the shape and type of a tensor."""
    number = like.shape[-1]
    return [torch.eye(number, dtype=like.dtype, device=like.device)[i].expand_as(like) for i in range(number)]


def is_one_hot(distribution: D.Distribution) -> bool:
    """Whether a discrete distribution draws one-hot vectors."""
    from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical

    return isinstance(distribution, (OneHotCategorical, MaskedOneHotCategorical, D.OneHotCategorical))


def _by_trying(mapped: Callable[[Tensor], Tensor], stored: Tensor, choose: Candidates) -> Tensor | None:
    candidates, dims = choose
    found, count = torch.zeros_like(candidates[0]), torch.zeros(stored.shape[:dims], dtype=torch.long)
    count = count.to(stored.device)
    for candidate in candidates:
        value = mapped(candidate)
        if value.shape != stored.shape or value.shape[:dims] != candidate.shape[:dims]:
            return None
        match = (value == stored).reshape(*count.shape, -1).all(-1)
        count += match
        found = torch.where(match.reshape((*count.shape, *(1,) * (candidate.ndim - dims))), candidate, found)
    return found if bool((count == 1).all()) else None


def _by_bisection(mapped: Callable[[Tensor], Tensor], stored: Tensor, like: Tensor) -> Tensor | None:
    if stored.shape != like.shape or not stored.is_floating_point() or not like.is_floating_point():
        return None
    zero, one, two = (mapped(torch.full_like(like, value)) for value in (0.0, 1.0, 2.0))
    slope = one - zero
    found = (stored - zero) / slope
    if not torch.allclose(two, zero + 2 * slope) or not _same(mapped(found), stored):
        low, high = torch.full_like(like, -REACH), torch.full_like(like, REACH)
        rises = mapped(high) > mapped(low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = (mapped(middle) >= stored) == rises
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        found = (low + high) / 2
    step = STEP * (1 + found.abs())
    middle, left, right = mapped(found), mapped(found - step), mapped(found + step)
    one_way = torch.sign(right - middle) == torch.sign(middle - left)
    steep = torch.minimum((right - middle).abs(), (middle - left).abs()) > SLOPE * step
    if not bool((one_way & steep).all()):
        return None
    rising = right > left
    for far in FAR:
        left, right = mapped(found - far), mapped(found + far)
        apart = torch.where(rising, (left < middle) & (middle < right), (left > middle) & (middle > right))
        if not bool(apart.all()):
            return None
    return found


def _same(value: Tensor, stored: Tensor) -> bool:
    return value.shape == stored.shape and torch.allclose(value.to(stored.dtype), stored, rtol=1e-4, atol=1e-5)


def _device(distribution: Any) -> torch.device:
    return distribution.probs.device if "probs" in distribution.__dict__ else distribution.logits.device


_LOCATION_SCALE = (D.Normal, D.Laplace, D.Cauchy, D.StudentT)


def noise_of(distribution: D.Distribution, sample: Tensor) -> Tensor | None:
    """The noise that makes a sample of a distribution; ``None`` for a family whose noise cannot be told from it.

    Of a distribution without reparameterised samples, whose samples do not follow its parameters, the sample itself.
    """
    if not distribution.has_rsample or isinstance(distribution, D.OneHotCategoricalStraightThrough):
        return sample
    if isinstance(distribution, D.TransformedDistribution):
        for transform in reversed(distribution.transforms):
            sample = transform.inv(sample)
        return noise_of(distribution.base_dist, sample)
    if isinstance(distribution, D.Independent):
        return noise_of(distribution.base_dist, sample)
    if isinstance(distribution, _LOCATION_SCALE):
        noise = (sample - distribution.loc) / distribution.scale
        return torch.where(distribution.scale == 0, torch.zeros_like(noise), noise)
    if isinstance(distribution, D.Uniform):
        return (sample - distribution.low) / (distribution.high - distribution.low)
    if isinstance(distribution, D.Exponential):
        return sample * distribution.rate
    if isinstance(distribution, D.MultivariateNormal):
        centred = (sample - distribution.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(cholesky_factor(distribution), centred, upper=False).squeeze(-1)
    if isinstance(distribution, D.relaxed_categorical.ExpRelaxedCategorical):
        return sample * distribution.temperature - distribution.logits  # up to a constant, which has no effect
    if _is_truncated_normal(distribution):
        return distribution.cdf(sample)
    return None


def sample_with(distribution: D.Distribution, noise: Tensor) -> Tensor:
    """The sample that this noise makes, with its gradient; the inverse of :func:`noise_of`."""
    if not distribution.has_rsample:
        return noise
    if isinstance(distribution, D.OneHotCategoricalStraightThrough):
        return noise + (distribution.probs - distribution.probs.detach())
    if isinstance(distribution, D.TransformedDistribution):
        sample = sample_with(distribution.base_dist, noise)
        for transform in distribution.transforms:
            sample = transform(sample)
        return sample
    if isinstance(distribution, D.Independent):
        return sample_with(distribution.base_dist, noise)
    if isinstance(distribution, _LOCATION_SCALE):
        return distribution.loc + noise * distribution.scale
    if isinstance(distribution, D.Uniform):
        return distribution.low + noise * (distribution.high - distribution.low)
    if isinstance(distribution, D.Exponential):
        return noise / distribution.rate
    if isinstance(distribution, D.MultivariateNormal):
        return distribution.loc + (cholesky_factor(distribution) @ noise.unsqueeze(-1)).squeeze(-1)
    if isinstance(distribution, D.relaxed_categorical.ExpRelaxedCategorical):
        scores = (distribution.logits + noise) / distribution.temperature
        return scores - scores.logsumexp(-1, keepdim=True)
    return distribution.icdf(noise)


def _is_truncated_normal(distribution: D.Distribution) -> bool:
    from torchrl.modules.distributions.truncated_normal import TruncatedStandardNormal

    return isinstance(distribution, TruncatedStandardNormal)
