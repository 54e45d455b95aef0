"""The noise behind a sample: with it, the sample follows the parameters of its distribution as ``rsample`` does.

For families whose samples are a known function of parameters and noise, the noise is found from a stored sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as D

from tdhook_rl.internals.torch_names import cholesky_factor

__all__ = ["noise_of", "sample_with"]

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
